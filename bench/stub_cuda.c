// A libcuda that launches nothing: what Triton's driver and launcher call, each call successful.
//
// A launch is recorded instead: the grid, the block, the bytes of shared memory, the stream, and the
// bytes of the parameters. Their sizes come from `stub_declare`, as a launch passes bare pointers.
// bench/stub_cuda.py builds and loads this file.

#include <cuda.h>
#include <string.h>

enum { MAX_FUNCTIONS = 4096, MAX_PARAMS = 128, MAX_BYTES = 1024, RECORDS = 256 };

typedef struct {
  CUfunction function;
  unsigned grid[3], block[3], shared;
  int n_bytes;
  CUstream stream;
  unsigned char bytes[MAX_BYTES];
} Record;

// The sizes of a function's parameters; its handle is its index plus 1.
static int param_sizes[MAX_FUNCTIONS][MAX_PARAMS];
static int param_counts[MAX_FUNCTIONS];
static size_t n_functions;
static Record records[RECORDS];
static unsigned long long n_launches;
// The memory that no kernel may see, as if it were the host's.
static CUdeviceptr hidden;

unsigned long long stub_launches(void) { return n_launches; }

const Record *stub_record(unsigned long long launch) { return &records[launch % RECORDS]; }

void stub_hide(CUdeviceptr address) { hidden = address; }

int stub_declare(size_t function, int n, const int *sizes) {
  int bytes = 0;
  for (int i = 0; i < n; ++i)
    bytes += sizes[i];
  if (function < 1 || function > n_functions || n > MAX_PARAMS || bytes > MAX_BYTES)
    return 0;
  memcpy(param_sizes[function - 1], sizes, n * sizeof(int));
  param_counts[function - 1] = n;
  return 1;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  Record *record = &records[n_launches++ % RECORDS];
  size_t index = (size_t)f - 1;
  record->function = f;
  record->grid[0] = config->gridDimX;
  record->grid[1] = config->gridDimY;
  record->grid[2] = config->gridDimZ;
  record->block[0] = config->blockDimX;
  record->block[1] = config->blockDimY;
  record->block[2] = config->blockDimZ;
  record->shared = config->sharedMemBytes;
  record->stream = config->hStream;
  record->n_bytes = 0;
  for (int i = 0; i < param_counts[index]; ++i) {
    memcpy(record->bytes + record->n_bytes, params[i], param_sizes[index][i]);
    record->n_bytes += param_sizes[index][i];
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (n_functions == MAX_FUNCTIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  *function = (CUfunction)++n_functions;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// The figures of an H100.
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 1 << 16; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (address == hidden)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the stub";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
