// The Metal names that the generated kernel source uses, and CUDA's, in C++: enough to run its text on a CPU.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct uint3 {
  uint32_t x, y, z;
};

// The position of a thread in CUDA's grid.
static uint3 blockIdx, blockDim, threadIdx;
inline uint3 make_uint3(uint32_t x, uint32_t y, uint32_t z) { return {x, y, z}; }
#define __device__

// What Metal and CUDA call it.
template <typename T>
inline T as_type(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __uint_as_float(uint32_t bits) { return as_type<float>(bits); }

// Both 16-bit types round to nearest, ties to even.
#ifdef __aarch64__
typedef __fp16 float16_t;
#else
// The builtins behind immintrin.h: parsing that header would take most of the compile time.
typedef float float4 __attribute__((vector_size(16)));
typedef int16_t short8 __attribute__((vector_size(16)));
struct float16_t {
  uint16_t bits;
  float16_t() = default;
  explicit float16_t(float value) : bits(uint16_t(__builtin_ia32_vcvtps2ph(float4{value}, 0)[0])) {}
  operator float() const { return __builtin_ia32_vcvtph2ps(short8{int16_t(bits)})[0]; }
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
