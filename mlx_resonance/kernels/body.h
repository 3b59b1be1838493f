// One thread of the rotary kernel: PAIRS neighbouring feature pairs of a token in up to HEADS heads of q or of k.
// q, k: (B, H, L, D) in any layout; offset: (B, 1), of the first token, or (B, L), of every one; constants: (2 * pairs + 1,), as ops.py packs them; q_out, k_out:
// row-contiguous. Grid: (B * L * groups, blocks of heads, 1), q's blocks first.
//
// The kernel that MLX generates is a single call of this, since MLX searches the text of a kernel, but not of its
// header, at every launch. The address space of an argument depends on its size: hence a type of its own for each.
template <
    int PAIRS,
    int HEADS,
    bool TRADITIONAL,
    bool BACKWARD,
    typename Q,
    typename K,
    typename Shape,
    typename Strides,
    typename Offset,
    typename OffsetShape,
    typename OffsetStrides,
    typename Constants,
    typename ConstantsShape,
    typename QOut,
    typename KOut>
DEVICE_FUNCTION void rotate_thread(
    Q q,
    Shape q_shape,
    Strides q_strides,
    K k,
    Shape k_shape,
    Strides k_strides,
    Offset offset,
    OffsetShape offset_shape,
    OffsetStrides offset_strides,
    Constants constants,
    ConstantsShape constants_shape,
    QOut q_out,
    KOut k_out,
    uint3 at) {
  const int length = q_shape[2];
  const int dims = q_shape[3];
  const int pairs = (constants_shape[0] - 1) / 2;
  // Groups of PAIRS pairs, and after them groups of 2 * PAIRS features that are only copied: as gpu.py counts them.
  const uint32_t pair_groups = (pairs + PAIRS - 1) / PAIRS;
  const uint32_t groups = pair_groups + (dims - 2 * pairs + 2 * PAIRS - 1) / (2 * PAIRS);
  const uint32_t group = at.x % groups;
  const uint32_t token = at.x / groups;
  const uint32_t q_blocks = (q_shape[1] + HEADS - 1) / HEADS;
  // CUDA launches whole blocks of threads.
  if (token >= uint32_t(q_shape[0]) * uint32_t(length)) {
    return;
  }
  const int64_t row = token / uint32_t(length);
  const int64_t step = token % uint32_t(length);
  const bool is_query = at.y < q_blocks;
  const int64_t head = int64_t(is_query ? at.y : at.y - q_blocks) * HEADS;

  const bool is_copy = group >= pair_groups;
  const int first = int(group) * PAIRS;
  const int copied = 2 * pairs + int(group - pair_groups) * 2 * PAIRS;
  Runs runs = {first, pairs, pairs + first, 2 * pairs};
  if (TRADITIONAL) {
    runs = {2 * first, 2 * pairs, 2 * first + PAIRS, 2 * pairs};
  }
  if (is_copy) {
    runs = {copied, dims, copied + PAIRS, dims};
  }
  const int64_t place = row * offset_strides[0];
  const int32_t position = offset_shape[1] == 1 ? int32_t(uint32_t(offset[place]) + uint32_t(step))
                                                : int32_t(offset[place + step * offset_strides[1]]);
  Turns<PAIRS> turned = {};
  for (int j = 0; j < PAIRS; ++j) {
    if (first + j < pairs) {
      const uint32_t phase = phase_of(position, uint32_t(constants[first + j]), constants[pairs + first + j]);
      turned.at[j] = turn_by(phase, FLOAT_OF_BITS(uint32_t(constants[2 * pairs])));
      if (BACKWARD) {
        turned.at[j].sin = -turned.at[j].sin;
      }
    }
  }
  if (is_query) {
    rotate_heads<PAIRS, TRADITIONAL>(
        q + row * q_strides[0] + head * q_strides[1] + step * q_strides[2],
        q_out + ((row * q_shape[1] + head) * length + step) * dims,
        q_strides[1],
        q_strides[3],
        int64_t(length) * dims,
        q_shape[1] - head < HEADS ? int(q_shape[1] - head) : HEADS,
        runs,
        is_copy,
        turned);
  } else {
    rotate_heads<PAIRS, TRADITIONAL>(
        k + row * k_strides[0] + head * k_strides[1] + step * k_strides[2],
        k_out + ((row * k_shape[1] + head) * length + step) * dims,
        k_strides[1],
        k_strides[3],
        int64_t(length) * dims,
        k_shape[1] - head < HEADS ? int(k_shape[1] - head) : HEADS,
        runs,
        is_copy,
        turned);
  }
}
