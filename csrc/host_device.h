// FLOE_INLINE: hot functions of g++ alone. FLOE_HOST_DEVICE: those that nvcc compiles, too.
#pragma once

#define FLOE_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define FLOE_HOST_DEVICE __host__ __device__ __forceinline__
#define FLOE_UNROLL _Pragma("unroll")
#define FLOE_UNROLL_BY_4 _Pragma("unroll 4")
#else
#define FLOE_HOST_DEVICE FLOE_INLINE
#define FLOE_UNROLL
#define FLOE_UNROLL_BY_4
#endif

// One copy of a hot CPU loop per instruction set, chosen by the dynamic linker: wheels carry no
// -march flag. Levels, not CPU names: a name is matched by maker, and leaves the others the default
// copy. Needs ifunc, hence glibc; elsewhere the default copy is the only one.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__CUDACC__) && \
    !defined(__clang__)
#define FLOE_VECTOR_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLOE_VECTOR_CLONES
#endif
