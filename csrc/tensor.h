// Tensors as the wrappers see them: memory that PyTorch owns, with sizes, strides and a dtype.
//
// All of PyTorch that the wrappers use is its stable C interface (torch/csrc/stable/c/shim.h and what it includes), but
// for two products (matmul.cpp) and what PyTorch is set to (torch_settings.h). So one compiled module serves every
// PyTorch from 2.11 on. Views are made here, without PyTorch. What PyTorch itself
// computes with has no place in autograd's graph.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000  // 2.11: nothing newer of the interface is used

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <exception>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace gptfast {

using c10::ScalarType;
constexpr ScalarType kByte = ScalarType::Byte, kInt = ScalarType::Int, kLong = ScalarType::Long,
                     kHalf = ScalarType::Half, kBFloat16 = ScalarType::BFloat16, kFloat = ScalarType::Float,
                     kDouble = ScalarType::Double;

// Throw the Python exceptions of these names; other exceptions of C++ become RuntimeError.
[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_index_error(const std::string& message);

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

#define CHECK_VALUE(condition, ...) \
  if (!(condition)) ::gptfast::throw_value_error(::gptfast::text(__VA_ARGS__))
#define CHECK_INDEX(condition, ...) \
  if (!(condition)) ::gptfast::throw_index_error(::gptfast::text(__VA_ARGS__))

// Throws RuntimeError if a function of PyTorch's C interface failed: with its reason, which PyTorches before 2.13 only
// write to stderr.
void check_torch(AOTITorchError error);

// Integers that someone else keeps.
class IntArrayRef {
 public:
  IntArrayRef(const int64_t* data, size_t size) : data_(data), size_(size) {}
  IntArrayRef(std::initializer_list<int64_t> list) : IntArrayRef(std::data(list), list.size()) {}
  IntArrayRef(const std::vector<int64_t>& list) : data_(list.data()), size_(list.size()) {}

  const int64_t* data() const { return data_; }
  size_t size() const { return size_; }
  const int64_t* begin() const { return data_; }
  const int64_t* end() const { return data_ + size_; }
  int64_t operator[](size_t i) const { return data_[i]; }
  bool operator==(const IntArrayRef& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  const int64_t* data_;
  size_t size_;
};
std::ostream& operator<<(std::ostream& out, IntArrayRef list);  // as PyTorch writes sizes: [2, 3]

// A tensor on the CPU, or none. Copies share its memory.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned);  // takes the handle over

  bool defined() const { return owner_ != nullptr; }
  ScalarType scalar_type() const { return dtype_; }
  int64_t element_size() const { return element_size_; }
  int64_t dim() const { return dim_; }
  IntArrayRef sizes() const { return {is_view() ? view_[0].data() : sizes_, static_cast<size_t>(dim_)}; }
  IntArrayRef strides() const { return {is_view() ? view_[1].data() : strides_, static_cast<size_t>(dim_)}; }
  // Negative dimensions count from the end. Throw IndexError for one that the tensor does not have.
  int64_t size(int64_t d) const { return sizes()[place(d)]; }
  int64_t stride(int64_t d) const { return strides()[place(d)]; }
  int64_t numel() const;
  bool is_contiguous() const;
  bool is_non_overlapping_and_dense() const;  // whether the elements fill a range of memory, in any order

  const void* const_data_ptr() const;
  void* data_ptr() const;
  // Throw RuntimeError for a tensor of another dtype than T's.
  template <class T>
  const T* const_data_ptr() const;
  template <class T>
  T* data_ptr() const;

  // Views; they have MAX_VIEW_DIM dimensions at most.
  Tensor view(int64_t elements_from_here, IntArrayRef sizes, IntArrayRef strides) const;
  Tensor narrow(int64_t d, int64_t start, int64_t length) const;
  Tensor t() const;  // of two dimensions

  // The handle of a new reference to this tensor.
  AtenTensorHandle new_handle() const;
  // Calls f with the handle of a tensor of the same memory that has no place in autograd's graph.
  template <class F>
  void with_plain(F f) const {
    const Tensor plain = without_graph();
    f(plain.owner_.get());
  }

 private:
  static constexpr int64_t MAX_VIEW_DIM = 4;

  bool is_view() const { return sizes_ == nullptr; }
  int64_t place(int64_t d) const;
  Tensor without_graph() const;

  std::shared_ptr<AtenTensorOpaque> owner_;
  ScalarType dtype_ = ScalarType::Undefined;
  int64_t element_size_ = 0, dim_ = 0, offset_ = 0;      // offset_: in bytes, of a view
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;  // the owner's own; null in a view
  std::array<std::array<int64_t, MAX_VIEW_DIM>, 2> view_{};
};

using TensorList = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<ScalarType>;

int32_t torch_dtype(ScalarType dtype);  // as PyTorch's C interface counts them
ScalarType dtype_of_torch(int32_t dtype);

// Returns an uninitialised tensor; where PyTorch is asked to fill new memory, it does.
Tensor empty(IntArrayRef sizes, ScalarType dtype);

// The same with the layout of another tensor, if that fills a range of memory.
Tensor empty_like(const Tensor& t, ScalarType dtype);

// Returns a tensor of memory that someone else has got, which calls release(start, context) in the end.
Tensor from_memory(void* start, IntArrayRef sizes, ScalarType dtype, void (*release)(void*, void*), void* context);

Tensor scalar(float value);  // 0-d fp32

// Returns t, or a copy with its last dimension, or all of it, contiguous, or in another dtype.
Tensor contiguous_rows(const Tensor& t);
Tensor contiguous(const Tensor& t);
Tensor to(const Tensor& t, ScalarType dtype);

void copy(const Tensor& to, const Tensor& from);  // of one shape, of any dtypes
// to = a + b, computed in fp32: (N, C) in fp32, bf16 or fp16, `to` and a in one dtype; `to` may be a.
void add(const Tensor& to, const Tensor& a, const Tensor& b);
void zero(const Tensor& t);
double item(const Tensor& t);  // the number in a tensor of one element

template <class T>
constexpr ScalarType dtype_for() {
  if constexpr (std::is_same_v<T, float>) return kFloat;
  if constexpr (std::is_same_v<T, double>) return kDouble;
  if constexpr (std::is_same_v<T, int64_t>) return kLong;
  if constexpr (std::is_same_v<T, int32_t>) return kInt;
  if constexpr (std::is_same_v<T, c10::BFloat16>) return kBFloat16;
  if constexpr (std::is_same_v<T, c10::Half>) return kHalf;
}

void check_dtype(const Tensor& t, ScalarType dtype);

// Calls f with a number of the type that a dtype has: of float32, bfloat16 and float16.
template <class F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {
    case kFloat:
      return f(float{});
    case kBFloat16:
      return f(c10::BFloat16{});
    default:
      return f(c10::Half{});
  }
}

template <class T>
const T* Tensor::const_data_ptr() const {
  check_dtype(*this, dtype_for<T>());
  return static_cast<const T*>(const_data_ptr());
}
template <class T>
T* Tensor::data_ptr() const {
  check_dtype(*this, dtype_for<T>());
  return static_cast<T*>(data_ptr());
}

// Calls f(begin, end) on shares of begin .. end, by several threads if there are more items than grain. Throws what f
// throws; PyTorch would make another error of it.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  struct Work {
    const F& f;
    std::mutex mutex;
    std::exception_ptr error;
  } work{f, {}, {}};
  const auto call = [](int64_t b, int64_t e, void* context) {
    Work& work = *static_cast<Work*>(context);
    try {
      work.f(b, e);
    } catch (...) {
      const std::lock_guard lock(work.mutex);
      work.error = std::current_exception();
    }
  };
  check_torch(torch_parallel_for(begin, end, grain, call, &work));
  if (work.error) std::rethrow_exception(work.error);
}

// The number of threads that a parallel region has, if one is opened here.
int64_t available_threads();

}  // namespace gptfast
