// The hot loops are plain loops. The compiler vectorises them, once for each instruction set.
//
// A wheel for x86-64 may only assume SSE2, yet most machines have AVX2 (x86-64-v3) or AVX-512 (x86-64-v4). A function
// marked MINIFOCUS_MULTIVERSION is compiled for all three, and the loader picks one. Helpers marked MINIFOCUS_INLINE
// become part of each version. Other processors and compilers get one version, for the instructions that the compiler was
// told of. So do builds with sanitizers, which are not ready yet when the loader picks.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MINIFOCUS_X86_VERSIONS 1
#define MINIFOCUS_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MINIFOCUS_X86_VERSIONS 0
#define MINIFOCUS_MULTIVERSION
#endif
#define MINIFOCUS_INLINE inline __attribute__((always_inline))

namespace minifocus::cpu {

// The bytes of a vector register in the version that runs, for the one loop that must fit the registers by hand.
inline int vector_bytes() {
#if MINIFOCUS_X86_VERSIONS
  return __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
#elif defined(__AVX512F__)
  return 64;
#elif defined(__AVX2__)
  return 32;
#else
  return 16;
#endif
}

}  // namespace minifocus::cpu
