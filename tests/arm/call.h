// The arguments of a call of the loops: read from a file, and its arrays written to another.
//
// An argument is its kind (0: a number of 8 bytes, 1: an array, 2: no array), its size in bytes, and its bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "loops.h"

namespace gptfast {

[[noreturn]] inline void fail(const std::string& message) {
  fprintf(stderr, "%s\n", message.c_str());
  exit(1);
}

// An array as the loops get it: aligned for no more than its elements, and followed by bytes that must stay.
class Array {
 public:
  explicit Array(std::vector<char> bytes) : size_(bytes.size()), data_(std::move(bytes)) {
    data_.insert(data_.begin(), OFFSET, 0);
    data_.insert(data_.end(), FENCE, MARK);
  }
  char* data() { return data_.data() + OFFSET; }
  void write(FILE* file) const {
    for (size_t i = 0; i < FENCE; ++i)
      if (data_[OFFSET + size_ + i] != MARK) fail("an array was written past its end");
    if (fwrite(data_.data() + OFFSET, 1, size_, file) != size_) fail("cannot write the output");
  }

 private:
  static constexpr size_t OFFSET = 8, FENCE = 64;
  static constexpr char MARK = 0x5A;
  size_t size_;
  std::vector<char> data_;
};

// The arguments of a call, taken one after the other.
class Call {
 public:
  explicit Call(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) fail(std::string("cannot read ") + path);
    int64_t head[2];
    while (fread(head, sizeof head, 1, file) == 1) {
      std::vector<char> bytes(head[1]);
      if (fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) fail("an argument ends too soon");
      if (head[0] == 0) {
        numbers_.emplace_back();
        memcpy(&numbers_.back(), bytes.data(), sizeof(int64_t));
      } else if (head[0] == 1) {
        pointers_.push_back((int64_t)arrays_.size());
        arrays_.emplace_back(std::move(bytes));
      } else {
        pointers_.push_back(-1);
      }
    }
    fclose(file);
  }
  void write(const char* path) const {
    if (next_number_ != numbers_.size() || next_pointer_ != pointers_.size()) fail("the call has too many arguments");
    FILE* file = fopen(path, "wb");
    if (!file) fail(std::string("cannot write ") + path);
    for (const Array& array : arrays_) array.write(file);
    if (fclose(file)) fail("cannot write the output");
  }

  int64_t integer() {
    if (next_number_ == numbers_.size()) fail("the call has too few numbers");
    return numbers_[next_number_++];
  }
  double real() {
    const int64_t bits = integer();
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  Dtype dtype() { return (Dtype)integer(); }
  template <class T = void>
  T* array() {
    if (next_pointer_ == pointers_.size()) fail("the call has too few arrays");
    const int64_t i = pointers_[next_pointer_++];
    return i < 0 ? nullptr : (T*)arrays_[i].data();
  }

 private:
  std::vector<int64_t> numbers_, pointers_;  // pointers: which array, or -1 for none
  std::vector<Array> arrays_;
  size_t next_number_ = 0, next_pointer_ = 0;
};

}  // namespace gptfast
