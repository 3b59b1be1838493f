// Runs every thread of a kernel over buffers read from standard input, and writes the outputs to standard output.
// Included after the kernel, after `void run(char** buffers, uint3 at)`, which calls it, and after the numbers of its
// INPUTS and OUTPUTS and of the THREADS of a block.
// Reads the ranges of the grid along x and y; for each input its size in bytes, the position of its first element, and
// the number of its pieces, which follow with position, size and bytes (the rest is zero); for each output its size and
// the range of bytes to return.

static int64_t number() {
  int64_t value;
  if (std::fread(&value, sizeof(value), 1, stdin) != 1) {
    std::abort();
  }
  return value;
}

int main() {
#ifdef FLUSH_TO_ZERO
#ifdef __aarch64__
  __builtin_aarch64_set_fpcr(__builtin_aarch64_get_fpcr() | 1 << 24);
#else
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);  // results and operands
#endif
#endif
  const int64_t x_from = number(), x_to = number(), y_from = number(), y_to = number();
  char* memory[INPUTS + OUTPUTS];
  char* buffers[INPUTS + OUTPUTS];
  int64_t from[OUTPUTS], bytes[OUTPUTS];
  for (int i = 0; i < INPUTS; ++i) {
    const int64_t size = number(), start = number();
    // Exactly as large as the array's memory: the sanitizer notices every access outside.
    memory[i] = static_cast<char*>(std::calloc(size, 1));
    buffers[i] = memory[i] + start;
    for (int64_t pieces = number(); pieces > 0; --pieces) {
      const int64_t at = number(), given = number();
      if (int64_t(std::fread(memory[i] + at, 1, given, stdin)) != given) {
        std::abort();
      }
    }
  }
  for (int i = 0; i < OUTPUTS; ++i) {
    const int64_t size = number();
    from[i] = number();
    bytes[i] = number();
    buffers[INPUTS + i] = memory[INPUTS + i] = static_cast<char*>(std::malloc(size));
    std::memset(memory[INPUTS + i] + from[i], 0xff, bytes[i]);  // NaN in every type
  }
  for (int64_t y = y_from; y < y_to; ++y) {
    for (int64_t x = x_from; x < x_to; ++x) {
      blockDim = {THREADS, 1, 1};
      blockIdx = {uint32_t(x / THREADS), uint32_t(y), 0};
      threadIdx = {uint32_t(x % THREADS), 0, 0};
      run(buffers, uint3{uint32_t(x), uint32_t(y), 0});
    }
  }
  for (int i = 0; i < OUTPUTS; ++i) {
    std::fwrite(memory[INPUTS + i] + from[i], 1, bytes[i], stdout);
  }
  for (char* block : memory) {
    std::free(block);
  }
  return 0;
}
