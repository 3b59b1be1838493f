// The rotary op's functions, in what Metal and CUDA C++ have in common; metal.h or cuda.h stands before them.
// A phase is that of ops.py bit for bit; the rest differs by what a compiler contracts, 1.5 ulp of float32 at most.

struct Turn {
  float cos;
  float sin;
};

template <int PAIRS>
struct Turns {
  Turn at[PAIRS];
};

// The features of a head that a thread holds: two runs of PAIRS neighbours, or fewer where a run comes to its end.
struct Runs {
  int low, low_end;
  int high, high_end;
};

struct Pair {
  float one;
  float other;
};

// Neighbours in memory, moved by one instruction.
template <int N, typename T>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

// Where a position is on the circle, in units of 2^-32 turns.
// modulus: the wavelength where it is a whole number, else 0. turns: turns per token in units of 2^-64.
DEVICE_FUNCTION uint32_t phase_of(int32_t position, uint32_t modulus, uint64_t turns) {
  // With its sign extended, a negative position wraps around like the circle does.
  uint64_t reduced = uint64_t(int64_t(position));
  if (modulus != 0) {
    const uint32_t distance = position < 0 ? 0u - uint32_t(position) : uint32_t(position);
    const uint32_t rest = distance % modulus;
    reduced = position < 0 && rest != 0 ? modulus - rest : rest;
  }
  return uint32_t((reduced * turns + 0x80000000u) >> 32);
}

// Cosine and sine of a phase times scale: cospi and sinpi of an eighth of a turn at most. Their series has an error that
// can be measured without a Mac; that of a library's own functions is another one on every device.
DEVICE_FUNCTION Turn turn_by(uint32_t phase, float scale) {
  const uint32_t quadrant = (phase + 0x20000000u) >> 30;
  const int32_t rest = int32_t(phase - (quadrant << 30));
  const float x = float(rest) * 4.65661287e-10f;  // times 2^-31: half turns, in [-1/4, 1/4)
  const float z = x * x;
  const float sin = x * (3.14159265f - z * (5.16771278f - z * (2.55016404f - z * (0.599264529f - z * 0.0821458866f))));
  const float cos =
      1.0f - z * (4.93480220f - z * (4.05871213f - z * (1.33526277f - z * (0.235330630f - z * 0.0258068913f))));
  const bool odd = quadrant & 1;
  Turn turn;
  turn.cos = (odd ? sin : cos) * (quadrant == 1 || quadrant == 2 ? -scale : scale);
  turn.sin = (odd ? cos : sin) * (quadrant >= 2 ? -scale : scale);
  return turn;
}

DEVICE_FUNCTION Pair rotated(Pair pair, Turn turn) {
  return {pair.one * turn.cos - pair.other * turn.sin, pair.one * turn.sin + pair.other * turn.cos};
}

// Whether both runs of every head are whole and lie as Packs do. Addresses are numbers of 64 bits on every GPU.
template <int PAIRS, typename T>
DEVICE_FUNCTION bool is_packed(const DEVICE_MEMORY T* x, int64_t head_stride, int64_t feature_stride, Runs runs) {
  return runs.low + PAIRS <= runs.low_end && runs.high + PAIRS <= runs.high_end && feature_stride == 1 &&
      head_stride % PAIRS == 0 && reinterpret_cast<uint64_t>(x + runs.low) % sizeof(Pack<PAIRS, T>) == 0 &&
      reinterpret_cast<uint64_t>(x + runs.high) % sizeof(Pack<PAIRS, T>) == 0;
}

template <int PAIRS, bool TRADITIONAL, typename T>
DEVICE_FUNCTION void rotate_packed(
    const DEVICE_MEMORY T* x, DEVICE_MEMORY T* y, Runs runs, bool is_copy, Turns<PAIRS> turns) {
  Pack<PAIRS, T> low = *reinterpret_cast<const DEVICE_MEMORY Pack<PAIRS, T>*>(x + runs.low);
  Pack<PAIRS, T> high = *reinterpret_cast<const DEVICE_MEMORY Pack<PAIRS, T>*>(x + runs.high);
  if (!is_copy) {
    float values[2 * PAIRS];
    for (int j = 0; j < PAIRS; ++j) {
      values[j] = static_cast<float>(low.at[j]);
      values[PAIRS + j] = static_cast<float>(high.at[j]);
    }
    for (int j = 0; j < PAIRS; ++j) {
      const int a = TRADITIONAL ? 2 * j : j;
      const int b = TRADITIONAL ? 2 * j + 1 : PAIRS + j;
      const Pair pair = rotated({values[a], values[b]}, turns.at[j]);
      values[a] = pair.one;
      values[b] = pair.other;
    }
    for (int j = 0; j < PAIRS; ++j) {
      low.at[j] = static_cast<T>(values[j]);
      high.at[j] = static_cast<T>(values[PAIRS + j]);
    }
  }
  *reinterpret_cast<DEVICE_MEMORY Pack<PAIRS, T>*>(y + runs.low) = low;
  *reinterpret_cast<DEVICE_MEMORY Pack<PAIRS, T>*>(y + runs.high) = high;
}

template <int PAIRS, bool TRADITIONAL, typename T>
DEVICE_FUNCTION void rotate_strided(
    const DEVICE_MEMORY T* x, int64_t stride, DEVICE_MEMORY T* y, Runs runs, bool is_copy, Turns<PAIRS> turns) {
// Unrolled, its addresses take registers from every thread, also from those that move packs: 72 instead of 40 on sm_90.
#pragma unroll 1
  for (int j = 0; j < PAIRS; ++j) {
    // Neighbours' pairs go on from the lower run into the higher one, which follows it.
    const int a = TRADITIONAL && !is_copy ? runs.low + 2 * j : runs.low + j;
    const int b = TRADITIONAL && !is_copy ? a + 1 : runs.high + j;
    if (is_copy) {
      if (a < runs.low_end) {
        y[a] = x[a * stride];
      }
      if (b < runs.high_end) {
        y[b] = x[b * stride];
      }
    } else if (b < runs.high_end) {
      const Pair pair = rotated({static_cast<float>(x[a * stride]), static_cast<float>(x[b * stride])}, turns.at[j]);
      y[a] = static_cast<T>(pair.one);
      y[b] = static_cast<T>(pair.other);
    }
  }
}

// Rotate a thread's features of one token in several heads, or copy them. x, y: the token's features in the first head.
template <int PAIRS, bool TRADITIONAL, typename T>
DEVICE_FUNCTION void rotate_heads(
    const DEVICE_MEMORY T* x,
    DEVICE_MEMORY T* y,
    int64_t x_head_stride,
    int64_t x_feature_stride,
    int64_t y_head_stride,
    int heads,
    Runs runs,
    bool is_copy,
    Turns<PAIRS> turns) {
  const bool packed =
      is_packed<PAIRS>(x, x_head_stride, x_feature_stride, runs) && is_packed<PAIRS>(y, y_head_stride, 1, runs);
  for (int head = 0; head < heads; ++head, x += x_head_stride, y += y_head_stride) {
    if (packed) {
      rotate_packed<PAIRS, TRADITIONAL>(x, y, runs, is_copy, turns);
    } else {
      rotate_strided<PAIRS, TRADITIONAL>(x, x_feature_stride, y, runs, is_copy, turns);
    }
  }
}
