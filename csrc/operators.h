// Kernels for PyTorch's dispatcher. It calls them with a stack of 64-bit values, in which tensors, lists and optional
// values are pointers that the kernel takes over; here they become the arguments of a C++ function and back.
#pragma once

#include <array>
#include <map>
#include <utility>

#include "tensor.h"

namespace gptfast {

// How a type of C++ is passed on the stack, and its name in the schema.
template <class T>
struct Argument {  // int64_t, double, bool
  static std::string name() { return std::is_same_v<T, bool> ? "bool" : std::is_same_v<T, double> ? "float" : "int"; }
  static T take(StableIValue value) {
    T t;
    memcpy(&t, &value, sizeof(T));
    return t;
  }
  static StableIValue give(const T& t) {
    StableIValue value = 0;
    memcpy(&value, &t, sizeof(T));
    return value;
  }
};

template <>
struct Argument<Tensor> {
  static std::string name() { return "Tensor"; }
  static Tensor take(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
  static StableIValue give(const Tensor& t) { return reinterpret_cast<StableIValue>(t.new_handle()); }
};

template <>
struct Argument<ScalarType> {
  static std::string name() { return "ScalarType"; }
  static ScalarType take(StableIValue value) { return dtype_of_torch(Argument<int32_t>::take(value)); }
  static StableIValue give(ScalarType dtype) { return Argument<int32_t>::give(torch_dtype(dtype)); }
};

template <>
struct Argument<std::string> {
  static std::string name() { return "str"; }
  static std::string take(StableIValue value) {
    const auto handle = reinterpret_cast<StringHandle>(value);
    size_t length;
    const char* data;
    check_torch(torch_string_length(handle, &length));
    check_torch(torch_string_c_str(handle, &data));
    std::string taken(data, length);
    check_torch(torch_delete_string(handle));
    return taken;
  }
};

template <class T>
struct Argument<std::vector<T>> {
  static std::string name() { return Argument<T>::name() + "[]"; }
  static std::vector<T> take(StableIValue value) {
    const auto list = reinterpret_cast<StableListHandle>(value);
    size_t size;
    check_torch(torch_list_size(list, &size));
    std::vector<T> taken;
    taken.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      check_torch(torch_list_get_item(list, i, &element));
      taken.push_back(Argument<T>::take(element));
    }
    check_torch(torch_delete_list(list));
    return taken;
  }
  static StableIValue give(const std::vector<T>& elements) {
    StableListHandle list;
    check_torch(torch_new_list_reserve_size(elements.size(), &list));
    for (const T& element : elements) check_torch(torch_list_push_back(list, Argument<T>::give(element)));
    return reinterpret_cast<StableIValue>(list);
  }
};

template <class T>
struct Argument<std::optional<T>> {
  static std::string name() { return Argument<T>::name() + "?"; }
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> pointer(reinterpret_cast<StableIValue*>(value));
    return pointer ? std::optional<T>(Argument<T>::take(*pointer)) : std::nullopt;
  }
  static StableIValue give(const std::optional<T>& t) {
    return t ? reinterpret_cast<StableIValue>(new StableIValue(Argument<T>::give(*t))) : 0;
  }
};

// What a function returns: one value, a tuple of them, or nothing.
template <class T>
struct Results {
  static constexpr size_t COUNT = 1;
  static std::string names() { return Argument<T>::name(); }
  static void give(StableIValue* stack, const T& t) { stack[0] = Argument<T>::give(t); }
  static T take(const StableIValue* stack) { return Argument<T>::take(stack[0]); }
};
template <class... T>
struct Results<std::tuple<T...>> {
  static constexpr size_t COUNT = sizeof...(T);
  static std::string names() {
    std::string all;
    ((all += (all.empty() ? "" : ", ") + Argument<T>::name()), ...);
    return all;
  }
  static void give(StableIValue* stack, const std::tuple<T...>& all) {
    std::apply([&](const T&... each) { ((*stack++ = Argument<T>::give(each)), ...); }, all);
  }
  static std::tuple<T...> take(const StableIValue* stack) { return take(stack, std::index_sequence_for<T...>()); }
  template <size_t... i>
  static std::tuple<T...> take(const StableIValue* stack, std::index_sequence<i...>) {
    return std::tuple<T...>(Argument<T>::take(stack[i])...);
  }
};
template <>
struct Results<void> {
  static constexpr size_t COUNT = 0;
  static std::string names() { return ""; }
  static std::tuple<> take(const StableIValue*) { return {}; }
};

// A function as the dispatcher calls it.
template <auto function, class Signature = std::remove_pointer_t<decltype(function)>>
struct Boxed;
template <auto function, class Result, class... Args>
struct Boxed<function, Result(Args...)> {
  using Taken = std::tuple<std::decay_t<Args>...>;

  static void call(StableIValue* stack, uint64_t, uint64_t) {
    const Taken args = Results<Taken>::take(stack);
    if constexpr (std::is_void_v<Result>)
      std::apply(function, args);
    else
      Results<Result>::give(stack, std::apply(function, args));
  }
  // For example "Tensor, Tensor?, float -> Tensor".
  static std::string signature() { return Results<Taken>::names() + " -> " + Results<Result>::names(); }
};

// The signature of each kernel by the operator's name. Python compares them with its schemas, so that a module that was
// compiled from other sources is refused and not called.
std::map<std::string, std::string>& signatures();

// Adds kernels for one key of the dispatcher while it lives, which is as long as the process does.
class Kernels {
 public:
  explicit Kernels(const char* key);

  template <auto function>
  Kernels& add(const char* name) {
    add(name, Boxed<function>::call, Boxed<function>::signature());
    return *this;
  }

 private:
  void add(const char* name, void (*call)(StableIValue*, uint64_t, uint64_t), const std::string& signature);

  TorchLibraryHandle library_;
};

// Calls the PyTorch reference of an operator, by its arguments on the stack, which has its results then.
void call_reference(const char* name, StableIValue* stack);

// Throws the Python exception that such a call raised, if it did; its results are then there, but mean nothing.
void throw_kept_error();

template <class Signature>
struct ReferenceOf;
template <class Result, class... Args>
struct ReferenceOf<Result(Args...)> {
  static Result call(const char* name, const std::decay_t<Args>&... args) {
    std::array<StableIValue, std::max(sizeof...(Args), Results<Result>::COUNT)> stack{
        Argument<std::decay_t<Args>>::give(args)...};
    call_reference(name, stack.data());
    const auto results = Results<Result>::take(stack.data());
    throw_kept_error();
    if constexpr (!std::is_void_v<Result>) return results;
  }
};

// Returns what the PyTorch reference of an operator returns for these arguments.
template <class Signature, class... Args>
auto reference(const char* name, const Args&... args) {
  return ReferenceOf<Signature>::call(name, args...);
}

}  // namespace gptfast
