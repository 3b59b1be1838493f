// What body.h and rotary.h need of CUDA.
#define DEVICE_FUNCTION __device__ inline
#define DEVICE_MEMORY
#define GRID_POSITION(attribute) \
  make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, 0)
#define FLOAT_OF_BITS(bits) __uint_as_float(bits)
