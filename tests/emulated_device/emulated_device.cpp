// The device "emulated" computes on the CPU under a device type of its own.
//
// Like on CUDA and MPS, operations reject CPU tensors, except 0-dim and empty ones and indices. Like MPS, the device has no
// float64. Not supported: sparse and quantized tensors, streams, pinned memory.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto kEmulated = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kEmulated, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ---- memory, streams and generators ----

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} allocator;
REGISTER_ALLOCATOR(kEmulated, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceType type() const override { return kEmulated; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* implementation = storage.unsafeGetStorageImpl();
    auto data = allocator.allocate(bytes);
    if (implementation->data()) std::memcpy(data.get(), implementation->data(), std::min(bytes, implementation->nbytes()));
    implementation->set_data_ptr_noswap(std::move(data));
    implementation->set_nbytes(bytes);
  }
} hooks;

// ---- tensors ----

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      dtype != at::kDouble && dtype != at::kComplexDouble, "the emulated device does not support float64");
}

Tensor with_storage(Tensor empty, c10::Storage storage, const Tensor& like) {
  empty.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  empty.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return empty;
}

// CPU tensor with the memory of an emulated one.
Tensor to_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device() != kDevice) return tensor;
  auto* source = tensor.storage().unsafeGetStorageImpl();
  c10::DataPtr data(source->mutable_data(), c10::Device(c10::kCPU));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), source->nbytes(), std::move(data), c10::GetAllocator(c10::kCPU), true);
  Tensor result = with_storage(at::empty({0}, tensor.options().device(at::kCPU)), storage, tensor);
  result._set_conj(tensor.is_conj());
  result._set_neg(tensor.is_neg());
  return result;
}

// Emulated tensor with the memory of a CPU tensor, which it owns.
Tensor to_emulated(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device() == kDevice) return tensor;
  check_dtype(tensor.scalar_type());
  auto* source = tensor.storage().unsafeGetStorageImpl();
  auto free = [](void* owner) { delete static_cast<Tensor*>(owner); };
  c10::DataPtr data(source->mutable_data(), new Tensor(tensor), free, kDevice);
  c10::Storage storage(c10::Storage::use_byte_size_t(), source->nbytes(), std::move(data), &allocator, true);
  Tensor empty = at::detail::empty_generic({0}, &allocator, kKeys, tensor.scalar_type(), std::nullopt);
  return with_storage(empty, storage, tensor);
}

template <typename Function>
c10::IValue map_tensors(const c10::IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (auto& tensor : tensors) tensor = function(tensor);
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<OptionalTensor> tensors;
    for (OptionalTensor tensor : value.toOptionalTensorList())
      tensors.push_back(tensor.has_value() ? OptionalTensor(function(*tensor)) : tensor);
    return tensors;
  }
  return value;
}

struct Argument {
  Tensor emulated, cpu;
  bool is_written;
};

// Fallback of all other operations: check the devices, run on the CPU, and convert the results.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  std::vector<Argument> converted;
  const auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const bool are_indices = value.isOptionalTensorList();
    const bool is_written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    value = map_tensors(value, [&](const Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      if (tensor.device() == kDevice) {
        check_dtype(tensor.scalar_type());
        converted.push_back({tensor, to_cpu(tensor), is_written});
        return converted.back().cpu;
      }
      TORCH_CHECK(
          tensor.dim() == 0 || tensor.numel() == 0 || are_indices,
          "Expected all tensors to be on the same device, but ", schema.name(), " got shape ", tensor.sizes(), " on ",
          tensor.device());
      return tensor;
    });
    if (value.isDevice()) value = c10::Device(c10::kCPU);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& argument : converted) {
    const bool is_resized = argument.cpu.sizes() != argument.emulated.sizes() ||
                            argument.cpu.storage().data() != argument.emulated.storage().data();
    if (argument.is_written && is_resized) {
      argument.emulated.resize_(argument.cpu.sizes());
      to_cpu(argument.emulated).copy_(argument.cpu);
    }
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = map_tensors((*stack)[i], [&](const Tensor& tensor) {
      for (auto& argument : converted) {
        if (argument.cpu.is_same(tensor)) return argument.emulated;
        if (tensor.defined() && tensor.storage().data() && tensor.storage().data() == argument.cpu.storage().data())
          return at::native::as_strided_tensorimpl(
              argument.emulated, tensor.sizes(), tensor.strides(), tensor.storage_offset());
      }
      return to_emulated(tensor);
    });
}

// ---- registered operations ----

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Pin = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(IntArrayRef size, Dtype dtype, Layout, Device, Pin, Format format) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Dtype dtype, Layout, Device, Pin) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  to_cpu(target).copy_(to_cpu(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar_dense(const Tensor& tensor) { return at::_local_scalar_dense(to_cpu(tensor)); }

const Tensor& resize_(const Tensor& tensor, IntArrayRef size, Format format) {
  const size_t bytes = (c10::multiply_integers(size) + tensor.storage_offset()) * tensor.itemsize();
  if (bytes > tensor.storage().nbytes()) hooks.resizePrivateUse1Bytes(tensor.storage(), bytes);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format.has_value() && *format != at::MemoryFormat::Preserve)
    tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return tensor;
}

Tensor convolution(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  const bool has_bias = bias && bias->defined();
  TORCH_CHECK(x.device() == weight.device() && (!has_bias || bias->device() == x.device()), "different devices");
  const auto cpu_bias = has_bias ? OptionalTensor(to_cpu(*bias)) : std::nullopt;
  return to_emulated(at::convolution(
      to_cpu(x), to_cpu(weight), cpu_bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  const std::vector<int64_t> bias_size{grad.size(1)};
  auto [grad_x, grad_weight, grad_bias] = at::convolution_backward(
      to_cpu(grad), to_cpu(x), to_cpu(weight), IntArrayRef(bias_size), stride, padding, dilation, transposed,
      output_padding, groups, mask);
  return {to_emulated(grad_x), to_emulated(grad_weight), to_emulated(grad_bias)};
}

int64_t attention_choice(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool, std::optional<double>, bool) {
  return 0;  // plain operations
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("resize_", resize_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("view.dtype", at::native::view_dtype);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("alias", at::native::alias);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_fused_sdp_choice", attention_choice);
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

using namespace at::autocast;  // for the macros
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FLOAT32)
}

const bool kIsRegistered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);
