// The Metal names that the generated kernel source uses, and CUDA's, in C++: enough to run its text on a CPU.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#ifndef __aarch64__
#include <immintrin.h>
#endif

struct uint3 {
  uint32_t x, y, z;
};

// Where CUDA has a thread's place in the grid.
static uint3 blockIdx, blockDim, threadIdx;
inline uint3 make_uint3(uint32_t x, uint32_t y, uint32_t z) { return {x, y, z}; }
#define __device__

// Both 16-bit types round to the nearest, ties to even.
#ifdef __aarch64__
typedef __fp16 float16_t;
#else
struct float16_t {
  uint16_t bits;
  float16_t() = default;
  explicit float16_t(float value) : bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) {}
  operator float() const { return _cvtsh_ss(bits); }
};
#endif

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value == value ? uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16) : 0x7fff;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

#define device
#define constant
