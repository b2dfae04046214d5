#include "tensor.h"

#include <omp.h>

#include "torch_settings.h"

// Of PyTorch's stable interface from 2.13 on.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace gptfast {
namespace {

// The dtypes that PyTorch 2.11's C interface names, by what it calls them. Newer ones are Undefined here, and no
// operator takes them.
std::vector<std::pair<int32_t, ScalarType>> known_dtypes() {
  return {{aoti_torch_dtype_float32(), kFloat},
          {aoti_torch_dtype_bfloat16(), kBFloat16},
          {aoti_torch_dtype_float16(), kHalf},
          {aoti_torch_dtype_float64(), kDouble},
          {aoti_torch_dtype_int64(), kLong},
          {aoti_torch_dtype_int32(), kInt},
          {aoti_torch_dtype_uint8(), kByte},
          {aoti_torch_dtype_int8(), ScalarType::Char},
          {aoti_torch_dtype_int16(), ScalarType::Short},
          {aoti_torch_dtype_bool(), ScalarType::Bool},
          {aoti_torch_dtype_complex64(), ScalarType::ComplexFloat},
          {aoti_torch_dtype_complex128(), ScalarType::ComplexDouble},
          {aoti_torch_dtype_complex32(), ScalarType::ComplexHalf},
          {aoti_torch_dtype_uint16(), ScalarType::UInt16},
          {aoti_torch_dtype_uint32(), ScalarType::UInt32},
          {aoti_torch_dtype_uint64(), ScalarType::UInt64},
          {aoti_torch_dtype_float8_e5m2(), ScalarType::Float8_e5m2},
          {aoti_torch_dtype_float8_e4m3fn(), ScalarType::Float8_e4m3fn},
          {aoti_torch_dtype_float8_e5m2fnuz(), ScalarType::Float8_e5m2fnuz},
          {aoti_torch_dtype_float8_e4m3fnuz(), ScalarType::Float8_e4m3fnuz}};
}
const std::vector<std::pair<int32_t, ScalarType>>& dtypes() {
  static const auto known = known_dtypes();
  return known;
}

void delete_tensor(AtenTensorHandle handle) { aoti_torch_delete_tensor_object(handle); }

std::vector<int64_t> contiguous_strides(IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// As PyTorch writes to new memory: NaN, or the largest integer.
void fill_new(const Tensor& t) {
  const int64_t n = t.numel();
  const auto fill = [&](auto value) { std::fill_n(static_cast<decltype(value)*>(t.data_ptr()), n, value); };
  switch (t.scalar_type()) {
    case kFloat:
      return fill(std::numeric_limits<float>::quiet_NaN());
    case kDouble:
      return fill(std::numeric_limits<double>::quiet_NaN());
    case kBFloat16:
      return fill(std::numeric_limits<c10::BFloat16>::quiet_NaN());
    case kHalf:
      return fill(std::numeric_limits<c10::Half>::quiet_NaN());
    case kLong:
      return fill(std::numeric_limits<int64_t>::max());
    default:
      memset(t.data_ptr(), 0xff, n * t.element_size());
  }
}

template <class T, class U>
void add_rows(const Tensor& to, const Tensor& a, const Tensor& b) {
  T* const out = to.data_ptr<T>();
  const T* const x = a.const_data_ptr<T>();
  const U* const y = b.const_data_ptr<U>();
  const int64_t C = to.size(1), out_stride = to.stride(0), x_stride = a.stride(0), y_stride = b.stride(0);
  parallel_for(0, to.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < C; ++j)
        out[i * out_stride + j] =
            static_cast<T>(static_cast<float>(x[i * x_stride + j]) + static_cast<float>(y[i * y_stride + j]));
  });
}

}  // namespace

void check_torch(AOTITorchError error) {
  if (!error) return;
  if (torch_exception_get_what_without_backtrace)
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  throw std::runtime_error("PyTorch refused what gptfast's C++ kernels asked for; the lines above say why");
}

void check_dtype(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype)
    throw std::runtime_error(text("expected scalar type ", dtype, " but found ", t.scalar_type()));
}

std::ostream& operator<<(std::ostream& out, IntArrayRef list) {
  out << '[';
  for (size_t i = 0; i < list.size(); ++i) out << (i ? ", " : "") << list[i];
  return out << ']';
}

int32_t torch_dtype(ScalarType dtype) {
  for (const auto& [number, known] : dtypes())
    if (known == dtype) return number;
  throw_value_error(text("gptfast's C++ kernels make no tensors of dtype ", dtype));
}
ScalarType dtype_of_torch(int32_t dtype) {
  for (const auto& [number, known] : dtypes())
    if (number == dtype) return known;
  return ScalarType::Undefined;
}

Tensor::Tensor(AtenTensorHandle owned) : owner_(owned, delete_tensor) {
  int64_t *sizes, *strides;
  int32_t dtype;
  check_torch(aoti_torch_get_dim(owned, &dim_));
  check_torch(aoti_torch_get_sizes(owned, &sizes));
  check_torch(aoti_torch_get_strides(owned, &strides));
  check_torch(aoti_torch_get_dtype(owned, &dtype));
  sizes_ = sizes;
  strides_ = strides;
  dtype_ = dtype_of_torch(dtype);
  element_size_ = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
}

int64_t Tensor::place(int64_t d) const {
  const int64_t i = d < 0 ? d + dim_ : d;
  CHECK_INDEX(i >= 0 && i < dim_, "a tensor ", sizes(), " has no dimension ", d);
  return i;
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int64_t size : sizes()) n *= size;
  return n;
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  const IntArrayRef n = sizes(), strides = this->strides();
  for (int64_t d = dim_; d-- > 0;) {
    if (n[d] == 0) return true;
    if (n[d] != 1 && strides[d] != stride) return numel() == 0;
    stride *= n[d];
  }
  return true;
}

bool Tensor::is_non_overlapping_and_dense() const {
  if (is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < dim_; ++d)
    if (size(d) != 1) dims.emplace_back(stride(d), size(d));
  std::sort(dims.begin(), dims.end());
  int64_t wanted = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != wanted) return false;
    wanted *= size;
  }
  return true;
}

const void* Tensor::const_data_ptr() const {
  const void* data;
  check_torch(torch_get_const_data_ptr(owner_.get(), &data));
  return static_cast<const char*>(data) + offset_;
}
void* Tensor::data_ptr() const {
  void* data;
  check_torch(torch_get_mutable_data_ptr(owner_.get(), &data));
  return static_cast<char*>(data) + offset_;
}

Tensor Tensor::view(int64_t elements_from_here, IntArrayRef sizes, IntArrayRef strides) const {
  if (sizes.size() > MAX_VIEW_DIM) throw std::logic_error("a view has at most 4 dimensions");
  Tensor view = *this;
  view.sizes_ = view.strides_ = nullptr;
  view.offset_ += elements_from_here * element_size_;
  view.dim_ = static_cast<int64_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), view.view_[0].begin());
  std::copy(strides.begin(), strides.end(), view.view_[1].begin());
  return view;
}

Tensor Tensor::narrow(int64_t d, int64_t start, int64_t length) const {
  Tensor narrowed = view(start * stride(d), sizes(), strides());
  narrowed.view_[0][d] = length;
  return narrowed;
}

Tensor Tensor::t() const { return view(0, {size(1), size(0)}, {stride(1), stride(0)}); }

AtenTensorHandle Tensor::new_handle() const {
  AtenTensorHandle handle;
  if (is_view()) {
    const int64_t from = offset_ / element_size_;
    check_torch(aoti_torch__reinterpret_tensor(owner_.get(), dim_, sizes().data(), strides().data(), from, &handle));
  } else {
    check_torch(aoti_torch_new_tensor_handle(owner_.get(), &handle));
  }
  return handle;
}

Tensor Tensor::without_graph() const {
  AtenTensorHandle handle;
  void* const data = const_cast<void*>(const_data_ptr());
  check_torch(torch_from_blob(data, dim_, sizes().data(), strides().data(), 0, torch_dtype(dtype_),
                              aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
                              nullptr, nullptr));
  return Tensor(handle);
}

namespace {

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype) {
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch_dtype(dtype),
                               aoti_torch_device_type_cpu(), -1, &handle))
    throw std::runtime_error(text("no memory for a tensor ", sizes, " of dtype ", dtype));
  Tensor made(handle);
  if (torch_fills_new_memory()) fill_new(made);
  return made;
}

}  // namespace

Tensor empty(IntArrayRef sizes, ScalarType dtype) { return empty_strided(sizes, contiguous_strides(sizes), dtype); }

Tensor empty_like(const Tensor& t, ScalarType dtype) {
  return t.is_non_overlapping_and_dense() ? empty_strided(t.sizes(), t.strides(), dtype) : empty(t.sizes(), dtype);
}

Tensor from_memory(void* start, IntArrayRef sizes, ScalarType dtype, void (*release)(void*, void*), void* context) {
  AtenTensorHandle handle;
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  check_torch(torch_from_blob(start, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                              torch_dtype(dtype), aoti_torch_device_type_cpu(), -1, &handle,
                              aoti_torch_layout_strided(), nullptr, 0, release, context));
  return Tensor(handle);
}

Tensor scalar(float value) {
  Tensor made = empty({}, kFloat);
  *made.data_ptr<float>() = value;
  return made;
}

Tensor contiguous_rows(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : contiguous(t); }

Tensor contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor made = empty(t.sizes(), t.scalar_type());
  copy(made, t);
  return made;
}

Tensor to(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  Tensor made = empty_like(t, dtype);  // a product wants a transposed matrix to stay one
  copy(made, t);
  return made;
}

void copy(const Tensor& to, const Tensor& from) {
  to.with_plain([&](AtenTensorHandle target) {
    from.with_plain([&](AtenTensorHandle source) { check_torch(aoti_torch_copy_(target, source, 0)); });
  });
}

void add(const Tensor& to, const Tensor& a_in, const Tensor& b_in) {
  const Tensor a = contiguous_rows(a_in), b = contiguous_rows(b_in);
  with_type(a.scalar_type(),
            [&](auto x) { with_type(b.scalar_type(), [&](auto y) { add_rows<decltype(x), decltype(y)>(to, a, b); }); });
}

void zero(const Tensor& t) {
  t.with_plain([](AtenTensorHandle handle) { check_torch(aoti_torch_zero_(handle)); });
}

double item(const Tensor& t) {
  CHECK_VALUE(t.numel() == 1, "a tensor of one element was wanted, got ", t.sizes());
  switch (t.scalar_type()) {
    case kFloat:
      return *t.const_data_ptr<float>();
    case kDouble:
      return *t.const_data_ptr<double>();
    case kLong:
      return static_cast<double>(*t.const_data_ptr<int64_t>());
    default:
      return *to(t, kDouble).const_data_ptr<double>();
  }
}

int64_t available_threads() {
  if (omp_in_parallel()) return 1;
  uint32_t threads;
  check_torch(torch_get_num_threads(&threads));
  return threads;
}

}  // namespace gptfast
