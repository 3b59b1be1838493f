// The rotary op's functions, in what Metal and CUDA C++ have in common; metal.h or cuda.h stands before them.
// The arithmetic of a phase is that of ops.py, bit for bit.

struct Turn {
  float cos;
  float sin;
};

template <int PAIRS>
struct Turns {
  Turn at[PAIRS];
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

// Cosine and sine of a phase times scale: cospi and sinpi of an eighth of a turn at most. Their series gives the same
// on every device and in ops.py, where no library's own function does, and its error can be measured without a Mac.
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

template <int N, typename T>
DEVICE_FUNCTION bool is_packed(const DEVICE_MEMORY T* x) {
  return reinterpret_cast<uint64_t>(x) % sizeof(Pack<N, T>) == 0;
}

// Turn the pairs first ... first + PAIRS - 1 of one token in several heads, or copy features past the last pair.
// x, y: the first head's features of the token. A pair is features (i, i + pairs), or (2i, 2i + 1) if TRADITIONAL.
template <int PAIRS, bool TRADITIONAL, typename T>
DEVICE_FUNCTION void rotate_heads(
    const DEVICE_MEMORY T* x,
    DEVICE_MEMORY T* y,
    int64_t x_head_stride,
    int64_t x_feature_stride,
    int64_t y_head_stride,
    int heads,
    int dims,
    int pairs,
    int first,
    Turns<PAIRS> turns) {
  if (first >= pairs) {
    const int from = 2 * pairs + 2 * (first - pairs);
    const int to = from + 2 * PAIRS < dims ? from + 2 * PAIRS : dims;
    for (int head = 0; head < heads; ++head, x += x_head_stride, y += y_head_stride) {
      for (int feature = from; feature < to; ++feature) {
        y[feature] = x[feature * x_feature_stride];
      }
    }
    return;
  }
  const int count = pairs - first < PAIRS ? pairs - first : PAIRS;
  // Two runs of PAIRS features hold the pairs; inside them, a pair's members are step_to_second apart.
  const int run = TRADITIONAL ? 2 * first : first;
  const int next_run = TRADITIONAL ? run + PAIRS : run + pairs;
  const bool packed = count == PAIRS && x_feature_stride == 1 && is_packed<PAIRS>(x + run) &&
      is_packed<PAIRS>(x + next_run) && x_head_stride % PAIRS == 0 && is_packed<PAIRS>(y + run) &&
      is_packed<PAIRS>(y + next_run) && y_head_stride % PAIRS == 0;
  for (int head = 0; head < heads; ++head, x += x_head_stride, y += y_head_stride) {
    if (packed) {
      Pack<PAIRS, T> low = *reinterpret_cast<const DEVICE_MEMORY Pack<PAIRS, T>*>(x + run);
      Pack<PAIRS, T> high = *reinterpret_cast<const DEVICE_MEMORY Pack<PAIRS, T>*>(x + next_run);
      float values[2 * PAIRS];
      for (int j = 0; j < PAIRS; ++j) {
        values[j] = static_cast<float>(low.at[j]);
        values[PAIRS + j] = static_cast<float>(high.at[j]);
      }
      for (int j = 0; j < PAIRS; ++j) {
        const int a = TRADITIONAL ? 2 * j : j;
        const int b = TRADITIONAL ? 2 * j + 1 : PAIRS + j;
        const float one = values[a], other = values[b];
        values[a] = one * turns.at[j].cos - other * turns.at[j].sin;
        values[b] = one * turns.at[j].sin + other * turns.at[j].cos;
      }
      for (int j = 0; j < PAIRS; ++j) {
        low.at[j] = static_cast<T>(values[j]);
        high.at[j] = static_cast<T>(values[PAIRS + j]);
      }
      *reinterpret_cast<DEVICE_MEMORY Pack<PAIRS, T>*>(y + run) = low;
      *reinterpret_cast<DEVICE_MEMORY Pack<PAIRS, T>*>(y + next_run) = high;
    } else {
      for (int j = 0; j < count; ++j) {
        const int a = TRADITIONAL ? run + 2 * j : run + j;
        const int b = TRADITIONAL ? a + 1 : next_run + j;
        const float one = static_cast<float>(x[a * x_feature_stride]);
        const float other = static_cast<float>(x[b * x_feature_stride]);
        y[a] = static_cast<T>(one * turns.at[j].cos - other * turns.at[j].sin);
        y[b] = static_cast<T>(one * turns.at[j].sin + other * turns.at[j].cos);
      }
    }
  }
}
