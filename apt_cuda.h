/* apt_cuda.h - the device for apt.h: the same training on an NVIDIA GPU - public domain or MIT, your choice (see apt.h)

   An optional companion of apt.h. A program that uses it stays as it is but for one line, and links one more unit, compiled by
   nvcc, against cuBLASLt:

       // my_program.c
       #include "apt.h"
       #include "apt_cuda.h"

       apt_desc desc = APT_ZERO;
       desc.backend = apt_cuda_open(NULL, message, sizeof message);      // NULL: no device; the message says why
       apt_ctx *ctx = apt_create(&desc);

       // gpu.cu:  nvcc -O2 -arch=native -c gpu.cu;  cc my_program.o gpu.o -lcublasLt -lcudart -lstdc++ -lm -lpthread
       #define APT_CUDA_IMPLEMENTATION
       #include "apt_cuda.h"

   Models, trainers, files, decisions and results stay what they are. Weights, gradients and activations lie in managed memory,
   which the device and the CPU both address, and never more of it than the device holds (apt_cuda_desc.memory_bytes): CUDA would
   page it in and out instead of saying that there is no memory. Operations go into one stream, in order, and the CPU waits before
   it looks. What this file has no kernel for, the CPU computes. No result hangs on the order in which threads run: there are no
   atomic sums.
   Refused, because the CPU's kernels alone can do it, are quantised models, apt_model_compress and modules (apt_moe_create,
   apt_bk_core_create, apt_bk_layer_create), whose arrays are the caller's.

   HOW THE KERNELS ARE WRITTEN
   A kernel's body is a row of phases, each of which every thread of the block runs (APTC_THREADS), with barriers between them, so
   that it is also plain C: with APT_CUDA_EMULATE the same bodies run on the CPU, block after block and thread after thread, and
   launches wait in a queue until somebody synchronises, so that a missing wait shows. That is how the index arithmetic is tested,
   under the address sanitizer and on machines without a device.

   HOW THEY ARE LAUNCHED
   One by one at first. Rows of launches that come again with the same arguments, as in steps over batches of one shape, are made
   into CUDA graphs, each of which costs the CPU one call; other launches are not held up. See "Graphs". */
#ifndef APT_CUDA_H
#define APT_CUDA_H

#ifdef APT_CUDA_IMPLEMENTATION
#define APT_BACKEND
#endif
#include "apt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What products compute in. Sums are float32 in every mode, and so is what trains: weights, their gradients, the optimizer. */
typedef enum apt_cuda_math {
    APT_CUDA_FP32 = 0,                /* float32: as on the CPU but for the order of sums */
    APT_CUDA_TF32,                    /* operands of products rounded to 10 bits behind the point */
    APT_CUDA_BF16,                    /* operands of products rounded to bfloat16, and activations and their gradients held in it,
                                         which halves what memory has to deliver; logits, statistics and losses are float32 */
    APT_CUDA_FP16                     /* operands of products rounded to float16; trainers scale the loss (see apt.h, ON A GPU) */
} apt_cuda_math;

/* Zero means the default. */
typedef struct apt_cuda_desc {
    uint32_t start_canary;
    int32_t device;                   /* as cudaSetDevice counts: 0 */
    apt_cuda_math math;
    size_t workspace_bytes;           /* for operands in other types, partial sums and cuBLASLt: 128 MiB; at least 8 MiB */
    size_t memory_bytes;              /* the most that everything else may take: what is free on the device at the start, less a
                                         32nd; never more. Contexts that share a device had better be given their shares.
                                         With `alloc` there is no limit but its own */
    void *(*alloc)(size_t bytes, void *user);      /* both or none: memory that the device and the CPU can both address, any */
    void (*release)(void *memory, void *user);     /* alignment; none: cudaMallocManaged, for the workspace cudaMalloc */
    void *alloc_user;
    int32_t no_graphs;                /* 1: all launches one by one, for debuggers; 0: those that come again are CUDA graphs */
    uint32_t end_canary;
} apt_cuda_desc;

/* Opens a device for one context (apt_desc.backend), which closes it. desc may be NULL. NULL: no device, no memory, or desc is
   invalid; message (may be NULL) says what failed, cut to `capacity` bytes. */
apt_backend *apt_cuda_open(const apt_cuda_desc *desc, char *message, size_t capacity);

#ifdef __cplusplus
}
#endif
#endif /* APT_CUDA_H */

#if defined(APT_CUDA_IMPLEMENTATION) && !defined(APT_CUDA_IMPLEMENTED)
#define APT_CUDA_IMPLEMENTED

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef APT_CUDA_EMULATE
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#endif

/* ---------------------------------------------------------------------------------------------------------------------
   The device, or its emulation

   APTC_KERNEL(name, args)   a kernel whose only argument is the struct `args`, called job
   APTC_KERNEL_SHARING(name, args, blocks)   the same, with so few registers that `blocks` blocks share a multiprocessor
   APTC_BX, APTC_BY          the block's coordinates; APTC_ROWS: how many there are of the second
   APTC_THREADS(t)           a phase: every thread of the block, t = 0 .. APTC_BLOCK - 1
   APTC_BARRIER              between two phases when one reads what another thread has written
   APTC_SHARED(type, x, n)   an array of the block; APTC_DYNAMIC: the one whose size is given at the launch, n at most
   APTC_PRIVATE(type, x)     a variable of each thread that outlives a phase; APTC_MINE(x, t) is t's
   APTC_WARP_SUM(x)          x of every thread = the sum of x over its warp, in a fixed order; likewise APTC_WARP_MAX, and
                             APTC_WARP_SUM_DOUBLE of a double
   APTC_INLINE               a function that becomes part of its callers, so that its loops (APTC_UNROLL) have constant bounds
                             there; APTC_NO_UNROLL: one that had better stay a loop
   APTC_FRAGMENT(type, x)    registers of each thread, APTC_MINE(x, t)[i] with constant i: those that are used are there, at most
                             APTC_REGISTERS; APTC_FRAGMENTS(type, x): as a parameter
   APTC_WARPS_BELOW(n)       leaves a function without barriers in all other warps
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTC_BLOCK = 256, APTC_WARP = 32, APTC_WARPS = APTC_BLOCK / APTC_WARP, APTC_GRID_ROWS = 65535 /* at most */ };
enum { APTC_REGISTERS = 64 };

#ifdef APT_CUDA_EMULATE
#define APTC_DEVICE static
#define APTC_KERNEL(name, args)                                                                                         \
    static void name(const args job, APTC_MAYBE const int64_t aptc_bx, APTC_MAYBE const int64_t aptc_by,                \
                     APTC_MAYBE const int64_t aptc_rows)
#define APTC_KERNEL_SHARING(name, args, blocks) APTC_KERNEL(name, args)
#define APTC_MAYBE __attribute__((unused))
#define APTC_BX aptc_bx
#define APTC_BY aptc_by
#define APTC_ROWS aptc_rows
#define APTC_THREADS(t) for (int32_t t = 0; t < APTC_BLOCK; t++)
#define APTC_BARRIER ((void)0)
#define APTC_SHARED(type, x, n) type x[n]
#define APTC_DYNAMIC(type, x, n) static __thread type x[n]           /* the sanitizer poisons all of what is on the stack */
#define APTC_PRIVATE(type, x) type x[APTC_BLOCK]
#define APTC_MINE(x, t) x[t]
#define APTC_WARP_SUM(x) aptc_warp_reduce(x, false)
#define APTC_WARP_MAX(x) aptc_warp_reduce(x, true)
#define APTC_WARP_SUM_DOUBLE(x) aptc_warp_sum_double(x)
#define APTC_INLINE static inline
#define APTC_UNROLL
#define APTC_NO_UNROLL
#define APTC_FRAGMENT(type, x) type x[APTC_BLOCK][APTC_REGISTERS]
#define APTC_FRAGMENTS(type, x) type (*x)[APTC_REGISTERS]
#define APTC_WARPS_BELOW(n) ((void)(n))

/* The butterfly that the warp's shuffles do. */
static void aptc_warp_reduce(float *x, bool max)
{
    for (int32_t step = APTC_WARP / 2; step > 0; step /= 2) {
        float old[APTC_BLOCK];
        memcpy(old, x, sizeof old);
        for (int32_t t = 0; t < APTC_BLOCK; t++) {
            const float other = old[t ^ step];
            x[t] = max ? (old[t] > other ? old[t] : other) : old[t] + other;
        }
    }
}

static void aptc_warp_sum_double(double *x)
{
    for (int32_t step = APTC_WARP / 2; step > 0; step /= 2) {
        double old[APTC_BLOCK];
        memcpy(old, x, sizeof old);
        for (int32_t t = 0; t < APTC_BLOCK; t++) x[t] = old[t] + old[t ^ step];
    }
}
#else
#define APTC_DEVICE static __device__
#define APTC_KERNEL(name, args) static __global__ void __launch_bounds__(APTC_BLOCK) name(const args job)
#define APTC_KERNEL_SHARING(name, args, blocks) static __global__ void __launch_bounds__(APTC_BLOCK, blocks) name(const args job)
#define APTC_BX ((int64_t)blockIdx.x)
#define APTC_BY ((int64_t)blockIdx.y)
#define APTC_ROWS ((int64_t)gridDim.y)
#define APTC_THREADS(t) for (int32_t t = (int32_t)threadIdx.x, aptc_once = 0; aptc_once == 0 && t >= 0; aptc_once = 1)
#define APTC_BARRIER __syncthreads()
#define APTC_SHARED(type, x, n) __shared__ type x[n]
#define APTC_DYNAMIC(type, x, n) extern __shared__ __align__(128) type x[]
#define APTC_PRIVATE(type, x) type x
#define APTC_MINE(x, t) x
#define APTC_WARP_SUM(x) x = aptc_warp_reduce(x, false)
#define APTC_WARP_MAX(x) x = aptc_warp_reduce(x, true)
#define APTC_WARP_SUM_DOUBLE(x) x = aptc_warp_sum_double(x)
#define APTC_INLINE static __device__ __forceinline__
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define APTC_UNROLL _Pragma("unroll")
#else                                 /* no tensor cores for bfloat16: what stands for them would be compiled for minutes */
#define APTC_UNROLL _Pragma("unroll 1")
#endif
#define APTC_NO_UNROLL _Pragma("unroll 1")
#define APTC_FRAGMENT(type, x) type x[APTC_REGISTERS]
#define APTC_FRAGMENTS(type, x) type *x
#define APTC_WARPS_BELOW(n) if ((int32_t)threadIdx.x / APTC_WARP >= (n)) return

static __device__ double aptc_warp_sum_double(double x)
{
    for (int32_t step = APTC_WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

static __device__ float aptc_warp_reduce(float x, bool max)
{
    for (int32_t step = APTC_WARP / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = max ? (x > other ? x : other) : x + other;
    }
    return x;
}
#endif

#ifdef __CUDACC__
#define APTC_BOTH static __host__ __device__
#else
#define APTC_BOTH static
#endif

APTC_BOTH int64_t aptc_min(int64_t a, int64_t b) { return a < b ? a : b; }
APTC_BOTH int64_t aptc_max(int64_t a, int64_t b) { return a > b ? a : b; }
APTC_BOTH int64_t aptc_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

APTC_BOTH float aptc_bf16_to_f32(uint16_t half)
{
    union { uint32_t bits; float value; } x;
    x.bits = (uint32_t)half << 16;
    return x.value;
}

/* Round to nearest even; a NaN stays one. */
APTC_BOTH uint16_t aptc_f32_to_bf16(float value)
{
    union { uint32_t bits; float value; } x;
    x.value = value;
    if (value != value) return (uint16_t)(x.bits >> 16 | 0x40);
    return (uint16_t)((x.bits + 0x7fff + (x.bits >> 16 & 1)) >> 16);
}

APTC_BOTH float aptc_f16_to_f32(uint16_t half)
{
    union { uint32_t bits; float value; } x;
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest < 0x400) {                          /* 0 and numbers below 2^-14: multiples of 2^-24 */
        x.value = (float)rest * 5.9604645e-8f;
        x.bits |= sign;
    } else x.bits = sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u));
    return x.value;
}

/* Round to nearest even; what is too large becomes infinite; a NaN stays one. */
APTC_BOTH uint16_t aptc_f32_to_f16(float value)
{
    union { uint32_t bits; float value; } x;
    x.value = value;
    const uint32_t sign = x.bits >> 16 & 0x8000, size = x.bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);        /* from 65520 on */
    if (size >= 0x38800000) return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
    x.bits = size;
    x.value += 0.5f;                             /* 0.5 has steps of 2^-24: the sum is rounded as the half must be */
    return (uint16_t)(sign | (x.bits - 0x3f000000));
}

/* What aptc_load and aptc_store know. */
static bool aptc_has(apt_dtype type) { return type == APT_F32 || type == APT_BF16 || type == APT_F16; }

APTC_BOTH int64_t aptc_size(apt_dtype type) { return type == APT_F32 ? 4 : 2; }

APTC_BOTH float aptc_from_half(uint16_t half, apt_dtype type)
{
#ifdef __CUDA_ARCH__
    if (type == APT_F16) return __half2float(__ushort_as_half(half));
#endif
    return type == APT_BF16 ? aptc_bf16_to_f32(half) : aptc_f16_to_f32(half);
}

/* Two of them, the first one in the lower bits */
APTC_BOTH uint32_t aptc_pack(apt_dtype type, float x, float y)
{
#ifdef __CUDA_ARCH__
    union { __nv_bfloat162 b; __half2 h; uint32_t bits; } pair = {__nv_bfloat162()};
    if (type == APT_BF16) pair.b = __floats2bfloat162_rn(x, y);
    else pair.h = __floats2half2_rn(x, y);
    return pair.bits;
#else
    if (type == APT_BF16) return (uint32_t)aptc_f32_to_bf16(x) | (uint32_t)aptc_f32_to_bf16(y) << 16;
    return (uint32_t)aptc_f32_to_f16(x) | (uint32_t)aptc_f32_to_f16(y) << 16;
#endif
}

APTC_BOTH float aptc_load(const void *data, apt_dtype type, int64_t i)
{
    return type == APT_F32 ? ((const float *)data)[i] : aptc_from_half(((const uint16_t *)data)[i], type);
}

APTC_BOTH void aptc_store(void *data, apt_dtype type, int64_t i, float value)
{
    if (type == APT_F32) ((float *)data)[i] = value;
    else ((uint16_t *)data)[i] = (uint16_t)aptc_pack(type, value, 0);
}

/* A matrix in the device's memory: element (i, j) is the one at i * ld + j, of `type`. */
typedef struct aptc_view { void *data; int64_t ld, type; } aptc_view;

APTC_BOTH float aptc_get(const aptc_view *x, int64_t i, int64_t j)
{
    return aptc_load(x->data, (apt_dtype)x->type, i * x->ld + j);
}

APTC_BOTH void aptc_set(const aptc_view *x, int64_t i, int64_t j, float value)
{
    aptc_store(x->data, (apt_dtype)x->type, i * x->ld + j, value);
}

/* Adjacent columns, which a thread reads and writes at once where they are all there and lie so that it can. */
enum { APTC_FOUR = 4 };
typedef struct aptc_four { float x[APTC_FOUR]; } aptc_four;

/* Elements j .. j + count - 1 of row i, and 0 */
APTC_DEVICE aptc_four aptc_get_four(const aptc_view *v, int64_t i, int64_t j, int32_t count)
{
    const apt_dtype type = (apt_dtype)v->type;
    const int64_t at = i * v->ld + j;
    aptc_four f = {{0, 0, 0, 0}};
#ifndef APT_CUDA_EMULATE
    const char *p = (const char *)v->data + at * aptc_size(type);
    if (count == APTC_FOUR && (uintptr_t)p % (uintptr_t)(APTC_FOUR * aptc_size(type)) == 0) {
        if (type == APT_F32) {
            const float4 x = *(const float4 *)p;
            f.x[0] = x.x, f.x[1] = x.y, f.x[2] = x.z, f.x[3] = x.w;
        } else {
            const uint2 x = *(const uint2 *)p;
            f.x[0] = aptc_from_half((uint16_t)x.x, type), f.x[1] = aptc_from_half((uint16_t)(x.x >> 16), type);
            f.x[2] = aptc_from_half((uint16_t)x.y, type), f.x[3] = aptc_from_half((uint16_t)(x.y >> 16), type);
        }
        return f;
    }
#endif
    for (int32_t c = 0; c < APTC_FOUR; c++)
        if (c < count) f.x[c] = aptc_load(v->data, type, at + c);
    return f;
}

APTC_DEVICE void aptc_set_four(const aptc_view *v, int64_t i, int64_t j, int32_t count, const aptc_four *f)
{
    const apt_dtype type = (apt_dtype)v->type;
    const int64_t at = i * v->ld + j;
#ifndef APT_CUDA_EMULATE
    char *p = (char *)v->data + at * aptc_size(type);
    if (count == APTC_FOUR && (uintptr_t)p % (uintptr_t)(APTC_FOUR * aptc_size(type)) == 0) {
        if (type == APT_F32) *(float4 *)p = make_float4(f->x[0], f->x[1], f->x[2], f->x[3]);
        else *(uint2 *)p = make_uint2(aptc_pack(type, f->x[0], f->x[1]), aptc_pack(type, f->x[2], f->x[3]));
        return;
    }
#endif
    for (int32_t c = 0; c < APTC_FOUR; c++)
        if (c < count) aptc_store(v->data, type, at + c, f->x[c]);
}

/* The same of a vector; NULL: ones */
APTC_DEVICE aptc_four aptc_vector_four(const float *x, int64_t j, int32_t count)
{
    const aptc_view v = {(void *)(uintptr_t)x, 0, APT_F32};
    const aptc_four ones = {{1, 1, 1, 1}};
    return x != NULL ? aptc_get_four(&v, 0, j, count) : ones;
}

/* ---------------------------------------------------------------------------------------------------------------------
   The queue
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    APTC_JOB_BYTES = 512,
    APTC_ALGORITHMS = 512,
    APTC_SCALARS = 16,                /* places for what the optimizer is told anew in every step, see aptc_adam_op */
    APTC_GRAPHS = 256,
    APTC_GRAPH_MIN = 4,               /* launches of a graph: fewer are not worth one, and more would let the device wait */
    APTC_GRAPH_MAX = 64,
    APTC_SEEN_SETS = 8192,
    APTC_SEEN_WAYS = 4,
    APTC_KEPT = 2,
    APTC_RANGES = 16,                 /* a context has a few passes */
    APTC_KEPT_ELEMENTS = 16384        /* smaller ones are soon converted */
};

#ifdef APT_CUDA_EMULATE
typedef void (*aptc_kernel)(const void *job, int64_t bx, int64_t by);      /* does all of it */
#else
typedef const void *aptc_kernel;
#endif

/* A launch: a kernel over a grid of blocks with its argument, or a product. Jobs are compared byte by byte, so they have no holes
   between their fields, or are zeroed before these are filled in. */
typedef struct aptc_launch {
    aptc_kernel kernel;               /* NULL: cuBLASLt's, of an aptc_product */
    const char *name;
    int64_t bx, by;
    size_t shared, bytes;             /* dynamic shared memory; of the job */
    uint64_t hash;                    /* of kernel, grid and job */
    union { uint64_t word[APTC_JOB_BYTES / 8]; char bytes[APTC_JOB_BYTES]; } job;
} aptc_launch;

/* A row of launches that has come more than once. */
typedef struct aptc_graph {
    aptc_launch *launch;              /* [count] */
    int32_t count;                    /* 0: a free place */
    int64_t used;                     /* when it was last followed */
#ifndef APT_CUDA_EMULATE
    cudaGraphExec_t exec;             /* NULL: not yet made */
    bool refused;                     /* could not be made */
#endif
} aptc_graph;

#ifndef APT_CUDA_EMULATE
/* The algorithm that cuBLASLt proposed for a product of this form, so that it is asked once. */
typedef struct aptc_algorithm {
    int64_t m, n, k, lda, ldb, ldc;
    int32_t form;                     /* transpositions, types, bias, accumulate, alignment; 0: a free place */
    cublasLtMatmulAlgo_t algorithm;
} aptc_algorithm;
#endif

/* What the optimizer is told anew in every step. */
typedef struct aptc_scalars { float grad_scale, step_size, eps, decay; } aptc_scalars;

/* What follows a product: c = (act(z + bias) + residual) * mask. z may be c or residual. The sizes are c's: see
   APTC_EACH_SIZED. */
typedef struct aptc_finish {
    aptc_view c, z, residual;         /* residual: data NULL, none */
    const float *bias, *mask;         /* bias NULL: none, or in z already */
    float *sizes;
    int64_t rows, n, act;
} aptc_finish;

/* The sizes of the other kernels that can add up are those of what is read or, if `written`, of what is written. */
typedef struct aptc_act_backward {
    aptc_view du, da, pre;
    const float *mask;
    float *sizes;
    int64_t rows, n, act, written;
} aptc_act_backward;

typedef struct aptc_residual {
    aptc_view y, x, r;
    const float *mask;
    float *sizes;
    int64_t rows, n, written;
} aptc_residual;

/* Forward: h = a v mask, whose sizes are added up; backward: those of dh */
typedef struct aptc_gate {
    aptc_view h, a, v, u, dh, du, dv;
    const float *mask;
    float *sizes;
    int64_t rows, n, act;
} aptc_gate;

/* Forward: y = norm(z), its sizes; backward: y = dz, the sizes of dy */
typedef struct aptc_norm {
    aptc_view y, z, dy;
    float *stats, *sizes;
    const float *saved, *gamma, *beta, *mask;
    int64_t rows, d, rms;
    float eps, unused;
} aptc_norm;

/* What waits for the operation behind it, see aptc_settle */
typedef enum aptc_waits {
    APTC_NOTHING = 0, APTC_FINISH, APTC_GATE, APTC_ACT, APTC_RESIDUAL, APTC_NORM, APTC_ATTENTION, APTC_SUM
} aptc_waits;

/* x(rows, n) with a row stride */
typedef struct aptc_matrix { const float *x; int64_t ld, rows, n; } aptc_matrix;

typedef struct aptc_attention {
    aptc_view q, k, v, o, d_o, dq, dk, dv;        /* dq, dk, dv: data NULL, not wanted */
    const float *lse, *bias, *mask, *dot, *rest;  /* dot + rest is what a gradient is compared with; rest NULL: 0 */
    float *lse_out, *dot_out, *rest_out, *dbias;  /* dbias: (sequences, heads, 2*span - 1) */
    float *sizes, *sums;              /* of |o| (backward: |d_o|) and o in a block, or NULL: see aptc_sum_rows */
    const int32_t *q_offsets, *k_offsets, *k_ends;
    int64_t pairs;                    /* rows times heads */
    int64_t blocks;                   /* of queries of the longest sequence */
    int32_t heads, share, dim, span, sequences, causal;
    float scale;
    apt_dtype type;                   /* of the operands of products */
    int32_t rows, tile, wide;         /* queries and keys of a tile, its columns (dim of them used): multiples of 16 */
} aptc_attention;

/* What was converted for a product and may be wanted by the next ones, as the input of query, key and value is: its addresses (0
   and 0: nothing), rows, columns and stride. It is kept until something may have been written there. */
typedef struct aptc_kept { uintptr_t first, end; int64_t rows, cols, ld; } aptc_kept;

typedef struct aptc_range { uintptr_t first, end; } aptc_range;

/* A matrix that is held in bfloat16, see "Where matrices are": (rows, n) with ld floats from row to row. */
typedef struct aptc_half { uintptr_t first, end; int64_t ld, rows, n; } aptc_half;

typedef struct aptc_device {
    apt_backend backend;
    apt_cuda_desc desc;
    apt_cuda_math math;
    char *work;                       /* workspace_bytes: see aptc_take */
    void *block;                      /* what it lies in */
    size_t work_bytes, used;
    size_t memory_left;               /* of desc.memory_bytes */
    int64_t room;                     /* shared memory that a block can have */
    apt_result result;                /* first failure since the last sync */
    char message[APTI_BACKEND_MESSAGE];

    aptc_graph graph[APTC_GRAPHS];
    aptc_graph *followed;             /* the graph whose first `at` launches have come and are held back, or NULL */
    int32_t at, recorded;
    aptc_launch *record;              /* [APTC_GRAPH_MAX], `recorded` of them: the last launches issued, all seen before */
    uint64_t *seen;                   /* [APTC_SEEN_SETS][APTC_SEEN_WAYS]: hashes of launches, the last one first */
    int64_t clock;
    aptc_waits waits;
    union {
        aptc_finish finish;
        aptc_gate gate;
        aptc_act_backward act;
        aptc_residual residual;
        aptc_norm norm;
        aptc_attention attention;
        apti_column_job sum;
    } waiting;
    aptc_matrix written;              /* what it will write; x NULL: nothing that it could add up */
    apti_column_job asked[2];         /* sums of |x| and of x, of what it writes; acc NULL: not asked for */
    aptc_kept kept[APTC_KEPT];
    char *kept_work;                  /* APTC_KEPT places of kept_bytes */
    int64_t kept_bytes;
    int32_t kept_next;                /* the place for the next one */
    aptc_range owned[APTC_RANGES], shared[APTC_RANGES];     /* see apt_backend.own and share; end 0: a free place */
    aptc_half *half;                  /* [halves] of half_capacity, by address; they do not overlap */
    int32_t halves, half_capacity;
    aptc_scalars *scalars;            /* [APTC_SCALARS], the device's */
    aptc_scalars given[APTC_SCALARS]; /* what they hold when the queue is done, `givens` of them */
    int32_t givens;
#ifdef APT_CUDA_EMULATE
    aptc_launch *queue;
    int32_t queued, capacity;
    int64_t launched, replayed;       /* launches so far; those that were part of a graph */
    int64_t widened;                  /* matrices of halves that were made floats */
#else
    int32_t device;
    cudaStream_t stream;
    cublasLtHandle_t blas;
    char *blas_work;
    size_t blas_bytes;
    aptc_algorithm *algorithms;       /* [APTC_ALGORITHMS], open addressing */
#endif
} aptc_device;

/* Which device a call means is a matter of the thread that makes it, and a program may have several of both. */
static void aptc_enter(const aptc_device *d)
{
#ifdef APT_CUDA_EMULATE
    (void)d;
#else
    (void)cudaSetDevice(d->device);
#endif
}

/* Keeps the first failure. */
static void aptc_fail(aptc_device *d, apt_result result, const char *format, ...)
{
    va_list args;
    if (d->result != APT_OK) return;
    d->result = result;
    va_start(args, format);
    (void)vsnprintf(d->message, sizeof d->message, format, args);
    va_end(args);
}

/* What the operands of products are rounded to */
static apt_dtype aptc_math_type(const aptc_device *d)
{
    return d->math == APT_CUDA_BF16 ? APT_BF16 : d->math == APT_CUDA_FP16 ? APT_F16 : APT_F32;
}

/* Room for what one operation needs aside, 256-byte aligned; NULL when it is more than the workspace. The next operation may
   write over it: the stream keeps the order. */
static void *aptc_take(aptc_device *d, int64_t bytes)
{
    const size_t size = ((size_t)bytes + 255) / 256 * 256;
    if (bytes < 0 || size > d->work_bytes - d->used) return NULL;
    void *p = d->work + d->used;
    d->used += size;
    return p;
}

#ifdef APT_CUDA_EMULATE
static void aptc_issue(aptc_device *d, const aptc_launch *l)
{
    if (d->queued == d->capacity) {
        const int32_t capacity = d->capacity > 0 ? 2 * d->capacity : 256;
        aptc_launch *queue = (aptc_launch *)realloc(d->queue, (size_t)capacity * sizeof(aptc_launch));
        if (queue == NULL) {
            aptc_fail(d, APT_E_MEMORY, "no memory for the queue");
            return;
        }
        d->queue = queue;
        d->capacity = capacity;
    }
    d->queue[d->queued++] = *l;
    d->launched++;
}
#else
static void aptc_check(aptc_device *d, cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return;
    aptc_fail(d, error == cudaErrorMemoryAllocation ? APT_E_MEMORY : APT_E_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}

static void aptc_product_issue(aptc_device *d, const void *job);

static void aptc_issue(aptc_device *d, const aptc_launch *l)
{
    aptc_launch copy = *l;            /* cudaLaunchKernel wants it writable */
    void *argument[] = {copy.job.bytes};
    if (l->kernel == NULL) aptc_product_issue(d, copy.job.bytes);
    else
        aptc_check(d, cudaLaunchKernel(l->kernel, dim3((unsigned)l->bx, (unsigned)l->by), dim3(APTC_BLOCK), argument, l->shared,
                                       d->stream), l->name);
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------
   Graphs

   A launch costs the CPU a few microseconds, and small models are bound by that. A graph of many launches costs hardly more than
   one, if nobody has to look at what is in it. So launches are compared with those that came before. They name arrays by their
   addresses, and the addresses of a step are those of the step before; what does change from step to step lies in memory.

   A launch is issued at once and, if it has been seen before, recorded; one that has not been seen ends the record, and so does a
   wait. A record becomes a graph of its own. From then on a launch that equals the first one of a graph is held back, and so are
   those behind it as long as they equal the graph's; with the last one the graph is launched. If another one comes, those that
   were held back are issued, and the graph is cut there. So nothing has to be told when shapes change: the old graphs are not met
   again and give their places to new ones.
   ------------------------------------------------------------------------------------------------------------------ */

static uint64_t aptc_hash(const aptc_launch *l)
{
    uint64_t h = 0x9e3779b97f4a7c15u ^ (uint64_t)(uintptr_t)l->kernel ^ (uint64_t)l->bx << 32 ^ (uint64_t)l->by << 16 ^ l->bytes;
    for (size_t i = 0; i < (l->bytes + 7) / 8; i++) {
        h = (h ^ l->job.word[i]) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    return h;
}

static bool aptc_same(const aptc_launch *a, const aptc_launch *b)
{
    return a->hash == b->hash && a->kernel == b->kernel && a->bx == b->bx && a->by == b->by && a->shared == b->shared &&
           a->bytes == b->bytes && memcmp(a->job.bytes, b->job.bytes, a->bytes) == 0;
}

/* Whether it has been seen lately, which it has been from now on. */
static bool aptc_seen(aptc_device *d, uint64_t hash)
{
    uint64_t *set = d->seen + hash % APTC_SEEN_SETS * APTC_SEEN_WAYS;
    int32_t i = 0;
    while (i < APTC_SEEN_WAYS - 1 && set[i] != hash) i++;
    const bool seen = set[i] == hash;
    for (; i > 0; i--) set[i] = set[i - 1];
    set[0] = hash;
    return seen;
}

static void aptc_graph_unmake(aptc_graph *g)
{
#ifdef APT_CUDA_EMULATE
    (void)g;
#else
    if (g->exec != NULL) (void)cudaGraphExecDestroy(g->exec);      /* one that still runs goes when it is done */
    g->exec = NULL;
    g->refused = false;
#endif
}

#ifdef APT_CUDA_EMULATE
static bool aptc_graph_launch(aptc_device *d, aptc_graph *g)
{
    d->replayed += g->count;
    return false;
}
#else
/* What cannot be a graph stays single launches, and is no failure. */
static void aptc_graph_make(aptc_device *d, aptc_graph *g)
{
    const apt_result before = d->result;
    cudaGraph_t graph = NULL;
    bool made = cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (made) {
        for (int32_t i = 0; i < g->count; i++) aptc_issue(d, &g->launch[i]);
        made = cudaStreamEndCapture(d->stream, &graph) == cudaSuccess && graph != NULL && d->result == before;
    }
#if CUDART_VERSION >= 12000
    made = made && cudaGraphInstantiate(&g->exec, graph, 0) == cudaSuccess;
#else
    made = made && cudaGraphInstantiateWithFlags(&g->exec, graph, 0) == cudaSuccess;
#endif
    if (graph != NULL) (void)cudaGraphDestroy(graph);
    if (made) return;
    g->exec = NULL;
    g->refused = true;
    d->result = before;
    (void)cudaGetLastError();
}

static bool aptc_graph_launch(aptc_device *d, aptc_graph *g)
{
    if (g->exec == NULL && !g->refused) aptc_graph_make(d, g);
    if (g->exec == NULL) return false;
    aptc_check(d, cudaGraphLaunch(g->exec, d->stream), "cudaGraphLaunch");
    return true;
}
#endif

/* The record becomes a graph, in the place of the one that was not used for longest. */
static void aptc_record_end(aptc_device *d)
{
    const int32_t count = d->recorded;
    d->recorded = 0;
    if (count < APTC_GRAPH_MIN) return;
    aptc_graph *g = &d->graph[0];
    for (int32_t i = 1; i < APTC_GRAPHS && g->count > 0; i++)
        if (d->graph[i].count == 0 || d->graph[i].used < g->used) g = &d->graph[i];
    aptc_launch *launch = (aptc_launch *)malloc((size_t)count * sizeof(aptc_launch));
    if (launch == NULL) return;
    aptc_graph_unmake(g);
    free(g->launch);
    memcpy(launch, d->record, (size_t)count * sizeof(aptc_launch));
    g->launch = launch;
    g->count = count;
    g->used = ++d->clock;
}

static void aptc_record(aptc_device *d, const aptc_launch *l)
{
    d->record[d->recorded++] = *l;
    if (d->recorded == APTC_GRAPH_MAX) aptc_record_end(d);
}

/* Issues what is held back of a graph that does not go on. The graph ends here from now on; where that is too short to be one,
   the record goes on as if there were none. */
static void aptc_unfollow(aptc_device *d)
{
    aptc_graph *g = d->followed;
    if (g == NULL) return;
    d->followed = NULL;
    for (int32_t i = 0; i < d->at; i++) {
        aptc_issue(d, &g->launch[i]);
        if (d->at < APTC_GRAPH_MIN) aptc_record(d, &g->launch[i]);
    }
    if (d->at < APTC_GRAPH_MIN) return;
    aptc_graph_unmake(g);
    g->count = d->at;
    aptc_record_end(d);
}

/* A graph that begins with the first `at` launches of the one that is followed, and goes on with l; at = 0: any that begins so */
static aptc_graph *aptc_graph_find(aptc_device *d, const aptc_launch *l)
{
    for (int32_t i = 0; i < APTC_GRAPHS; i++) {
        aptc_graph *g = &d->graph[i];
        if (g->count <= d->at || !aptc_same(&g->launch[d->at], l)) continue;
        int32_t same = 0;
        while (same < d->at && aptc_same(&g->launch[same], &d->followed->launch[same])) same++;
        if (same == d->at) return g;
    }
    return NULL;
}

/* Whether l goes on with the graph that is followed, or with another one, or begins one. */
static bool aptc_follow(aptc_device *d, const aptc_launch *l)
{
    if (d->followed != NULL && !aptc_same(&d->followed->launch[d->at], l)) {
        aptc_graph *other = aptc_graph_find(d, l);
        if (other == NULL) aptc_unfollow(d);
        else d->followed = other;
    }
    if (d->followed == NULL) {
        d->at = 0;
        d->followed = aptc_graph_find(d, l);
        if (d->followed == NULL) return false;
    }
    aptc_graph *g = d->followed;
    g->used = ++d->clock;             /* now the last one whose place a record takes */
    if (++d->at < g->count) return true;
    d->followed = NULL;
    aptc_record_end(d);
    if (!aptc_graph_launch(d, g))
        for (int32_t i = 0; i < g->count; i++) aptc_issue(d, &g->launch[i]);
    return true;
}

static void aptc_put(aptc_device *d, aptc_kernel kernel, const char *name, const void *job, size_t bytes, int64_t bx, int64_t by,
                     size_t shared)
{
    aptc_launch l;
    if (bx <= 0 || by <= 0) return;
    l.kernel = kernel;
    l.name = name;
    l.bx = bx;
    l.by = by;
    l.shared = shared;
    l.bytes = bytes;
    l.job.word[(bytes - 1) / 8] = 0;
    memcpy(l.job.bytes, job, bytes);
    l.hash = aptc_hash(&l);
    if (!d->desc.no_graphs && aptc_follow(d, &l)) return;
    aptc_issue(d, &l);
    if (d->desc.no_graphs) return;
    if (aptc_seen(d, l.hash)) aptc_record(d, &l);
    else aptc_record_end(d);
}

static void aptc_settle(aptc_device *d);

/* The operation that was put into d->waiting waits, and will write x. */
static void aptc_wait(aptc_device *d, aptc_waits waits, const float *x, int64_t ld, int64_t rows, int64_t n)
{
    const aptc_matrix written = {x, ld, rows, n};
    d->waits = waits;
    d->written = written;
}

/* Everything is issued. */
static void aptc_issue_all(aptc_device *d)
{
    d->used = 0;
    aptc_settle(d);
    aptc_unfollow(d);
    aptc_record_end(d);
}

/* APTC_LAUNCHER(name, args) behind every kernel: what APTC_LAUNCH needs of it. The job has to fit. */
#define APTC_FITS(job) (0 * sizeof(char[sizeof(job) <= APTC_JOB_BYTES ? 1 : -1]))
#define APTC_PUT(d, kernel, name, job, bx, by, bytes) \
    aptc_put(d, kernel, name, &(job), sizeof(job) + APTC_FITS(job), bx, by, (size_t)(bytes))
#ifdef APT_CUDA_EMULATE
#define APTC_LAUNCHER(name, args)                                                                                       \
    static void name##_run(const void *job, int64_t bx, int64_t by)                                                     \
    {                                                                                                                   \
        args copy;                                                                                                      \
        memcpy(&copy, job, sizeof copy);                                                                                \
        for (int64_t y = 0; y < by; y++)                                                                                \
            for (int64_t x = 0; x < bx; x++) name(copy, x, y, by);                                                      \
    }
#define APTC_LAUNCH_DYNAMIC(d, name, job, bx, by, bytes) APTC_PUT(d, name##_run, #name, job, bx, by, bytes)
#else
#define APTC_LAUNCHER(name, args)
#define APTC_LAUNCH_DYNAMIC(d, name, job, bx, by, bytes) APTC_PUT(d, (const void *)(name), #name, job, bx, by, bytes)
#endif
#define APTC_LAUNCH(d, name, job, bx, by) APTC_LAUNCH_DYNAMIC(d, name, job, bx, by, 0)

/* ---------------------------------------------------------------------------------------------------------------------
   Where matrices are

   With APT_CUDA_BF16 what operations write into memory that the CPU does not look at (see `own` in apt.h) is held in bfloat16:
   half the bytes, and products read it as it is. Such a matrix keeps the place that it has on the CPU. Each of its rows has
   the first half of the row of floats that it stands for, so that its view has twice the stride, and making floats of it moves
   nothing but the row's own numbers.
   Every operation asks for views of its matrices, aptc_in before it reads and aptc_out before it writes. A matrix that is asked
   for in another form than it was written in becomes floats first, as all do when the CPU wants to look.
   ------------------------------------------------------------------------------------------------------------------ */

/* x(rows, n) of floats from its halves. Block: rows APTC_BY, ...; from behind, since a float lies where later halves were. */
typedef struct aptc_widen { float *x; int64_t ld, rows, n; } aptc_widen;

APTC_KERNEL(aptc_widen_kernel, aptc_widen)
{
    APTC_PRIVATE(float, value);
    for (int64_t i = APTC_BY; i < job.rows; i += APTC_ROWS) {
        float *row = job.x + i * job.ld;
        for (int64_t first = (job.n - 1) / APTC_BLOCK * APTC_BLOCK; first >= 0; first -= APTC_BLOCK) {
            APTC_THREADS(t) APTC_MINE(value, t) = first + t < job.n ? aptc_load(row, APT_BF16, first + t) : 0.0f;
            APTC_BARRIER;
            APTC_THREADS(t) if (first + t < job.n) row[first + t] = APTC_MINE(value, t);
            APTC_BARRIER;
        }
    }
}
APTC_LAUNCHER(aptc_widen_kernel, aptc_widen)

static aptc_view aptc_floats(const float *x, int64_t ld)
{
    const aptc_view v = {(void *)(uintptr_t)x, ld, APT_F32};
    return v;
}

static uintptr_t aptc_matrix_end(const float *x, int64_t ld, int64_t rows, int64_t n)
{
    return (uintptr_t)(x + (rows - 1) * ld + n);
}

/* The first matrix of halves that ends behind an address */
static int32_t aptc_half_behind(const aptc_device *d, uintptr_t address)
{
    int32_t low = 0, high = d->halves;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (d->half[middle].end > address) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void aptc_half_drop(aptc_device *d, int32_t i)
{
    d->halves--;
    memmove(d->half + i, d->half + i + 1, (size_t)(d->halves - i) * sizeof(aptc_half));
}

static void aptc_half_widen(aptc_device *d, int32_t i)
{
    const aptc_half h = d->half[i];
    const aptc_widen job = {(float *)h.first, h.ld, h.rows, h.n};
    APTC_LAUNCH(d, aptc_widen_kernel, job, 1, aptc_min(h.rows, APTC_GRID_ROWS));
    aptc_half_drop(d, i);
#ifdef APT_CUDA_EMULATE
    d->widened++;
#endif
}

static void aptc_half_add(aptc_device *d, const aptc_half *h)
{
    const int32_t at = aptc_half_behind(d, h->first);
    memmove(d->half + at + 1, d->half + at, (size_t)(d->halves - at) * sizeof(aptc_half));
    d->half[at] = *h;
    d->halves++;
}

static bool aptc_half_room(aptc_device *d)
{
    if (d->halves < d->half_capacity) return true;
    const int32_t capacity = d->half_capacity > 0 ? 2 * d->half_capacity : 256;
    aptc_half *half = (aptc_half *)realloc(d->half, (size_t)capacity * sizeof(aptc_half));
    if (half == NULL) return false;
    d->half = half;
    d->half_capacity = capacity;
    return true;
}

/* The view of x(rows, n) inside of a matrix of halves, if it is a part of it; else data NULL */
static aptc_view aptc_half_part(const aptc_half *h, const float *x, int64_t ld, int64_t rows, int64_t n)
{
    aptc_view v = {NULL, 0, APT_BF16};
    if ((uintptr_t)x < h->first || (ld != h->ld && rows > 1)) return v;
    const int64_t at = (int64_t)((uintptr_t)x - h->first) / 4, row = at / h->ld, column = at % h->ld;
    if (row + rows > h->rows || column + n > h->n) return v;
    v.data = (char *)h->first + 4 * row * h->ld + 2 * column;
    v.ld = 2 * h->ld;
    return v;
}

/* x(rows, n), with ld floats from row to row, as it is now; NULL: no matrix */
static aptc_view aptc_in(aptc_device *d, const float *x, int64_t ld, int64_t rows, int64_t n)
{
    if (x == NULL || rows < 1 || n < 1) return aptc_floats(x, ld);
    const uintptr_t end = aptc_matrix_end(x, ld, rows, n);
    for (;;) {
        const int32_t i = aptc_half_behind(d, (uintptr_t)x);
        if (i == d->halves || d->half[i].first >= end) return aptc_floats(x, ld);
        const aptc_view part = aptc_half_part(&d->half[i], x, ld, rows, n);
        if (part.data != NULL) return part;
        aptc_half_widen(d, i);
    }
}

/* The same of as many rows as there are, which are not known: those of the first one's matrix */
static aptc_view aptc_in_rows(aptc_device *d, const float *x, int64_t ld, int64_t n)
{
    const int32_t i = aptc_half_behind(d, (uintptr_t)x);
    return aptc_in(d, x, ld, i < d->halves && d->half[i].ld != ld ? 2 : 1, n);
}

/* Something else than a part of them will be written from x up to `end`: matrices that it covers, or that begin there as well,
   are gone; what reaches beyond is made floats before. */
static void aptc_half_clear(aptc_device *d, uintptr_t x, uintptr_t end)
{
    for (;;) {
        const int32_t i = aptc_half_behind(d, x);
        if (i == d->halves || d->half[i].first >= end) return;
        if (d->half[i].first == x || (d->half[i].first > x && d->half[i].end <= end)) aptc_half_drop(d, i);
        else aptc_half_widen(d, i);
    }
}

static bool aptc_owned(const aptc_device *d, uintptr_t first, uintptr_t end)
{
    for (int32_t i = 0; i < APTC_RANGES; i++)
        if (d->owned[i].first <= first && end <= d->owned[i].end) return true;
    return false;
}

/* x(rows, n) before all of it is written, as halves where they may be. The operation must not read it in another form: what is
   written in place goes into the view that was read. */
static aptc_view aptc_out_as(aptc_device *d, float *x, int64_t ld, int64_t rows, int64_t n, bool halves)
{
    if (x == NULL || rows < 1 || n < 1) return aptc_floats(x, ld);
    const aptc_half whole = {(uintptr_t)x, aptc_matrix_end(x, ld, rows, n), ld, rows, n};
    const int32_t i = aptc_half_behind(d, whole.first);
    if (i < d->halves) {
        const aptc_half *h = &d->half[i];
        const aptc_view part = aptc_half_part(h, x, ld, rows, n);
        if (part.data != NULL && (halves || rows < h->rows || n < h->n)) return part;
    }
    aptc_half_clear(d, whole.first, whole.end);
    if (!halves || d->math != APT_CUDA_BF16 || ld < n || !aptc_owned(d, whole.first, whole.end) || !aptc_half_room(d))
        return aptc_floats(x, ld);
    aptc_half_add(d, &whole);
    return aptc_half_part(&whole, x, ld, rows, n);
}

static aptc_view aptc_out(aptc_device *d, float *x, int64_t ld, int64_t rows, int64_t n)
{
    return aptc_out_as(d, x, ld, rows, n, true);
}

/* `count` floats before they are written as such */
static void aptc_out_floats(aptc_device *d, const float *x, int64_t count)
{
    if (x != NULL && count > 0) aptc_half_clear(d, (uintptr_t)x, (uintptr_t)(x + count));
}

/* y = x in place, or another matrix */
static aptc_view aptc_out_over(aptc_device *d, float *y, int64_t ldy, int64_t rows, int64_t n, const float *x,
                               const aptc_view *from)
{
    return y == x ? *from : aptc_out(d, y, ldy, rows, n);
}

/* The range that begins at `first`, or a free place; NULL: all are taken, and what was to be said there stays unsaid */
static aptc_range *aptc_range_at(aptc_range *ranges, uintptr_t first)
{
    aptc_range *place = NULL;
    for (int32_t i = 0; i < APTC_RANGES; i++) {
        if (ranges[i].end == 0) place = &ranges[i];
        else if (ranges[i].first == first) return &ranges[i];
    }
    return place;
}

static void aptc_ranges_drop(aptc_range *ranges, uintptr_t first, uintptr_t end)
{
    for (int32_t i = 0; i < APTC_RANGES; i++)
        if (ranges[i].first >= first && ranges[i].end <= end) memset(&ranges[i], 0, sizeof ranges[i]);
}

static void aptc_own(void *self, const void *memory, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    const aptc_range range = {(uintptr_t)memory, (uintptr_t)memory + bytes};
    aptc_range *place = aptc_range_at(d->owned, range.first);
    if (place != NULL) *place = range;
}

/* Nothing is widened there any more. */
static void aptc_half_forget(aptc_device *d, uintptr_t first, uintptr_t end)
{
    const int32_t i = aptc_half_behind(d, first);
    int32_t j = i;
    while (j < d->halves && d->half[j].first < end) j++;
    if (j == i) return;
    memmove(d->half + i, d->half + j, (size_t)(d->halves - j) * sizeof(aptc_half));
    d->halves -= j - i;
}

static void aptc_forget(void *self, const void *memory, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
    d->used = 0;
    aptc_settle(d);                   /* it may read there */
    aptc_half_forget(d, (uintptr_t)memory, (uintptr_t)memory + bytes);
}

/* ---------------------------------------------------------------------------------------------------------------------
   Element by element
   ------------------------------------------------------------------------------------------------------------------ */

/* act(x), and its slope; act: apt_activation, -1 none */
APTC_DEVICE float aptc_act(float x, int32_t act, float *slope)
{
    if (act == APT_RELU) {
        *slope = x > 0 ? 1.0f : 0.0f;
        return x > 0 ? x : 0.0f;
    }
    if (act == APT_GELU_ERF) {
        const float phi = 0.5f * erfcf(-x * 0.70710678f);
        *slope = phi + x * 0.39894228f * expf(-0.5f * x * x);
        return x * phi;
    }
    if (act == APT_GELU_TANH) {
        const float u = 0.79788456f * (x + 0.044715f * x * x * x), t = tanhf(u);
        *slope = 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.79788456f * (1 + 3 * 0.044715f * x * x);
        return 0.5f * x * (1 + t);
    }
    if (act == APT_SILU) {
        const float s = 1 / (1 + expf(-x));
        *slope = s * (1 + x * (1 - s));
        return x * s;
    }
    *slope = 1;
    return x;
}

/* Matrices that are read and written element by element. Threads of a block have APTC_FOUR columns each, side by side, and what
   is left of them further rows; a block goes on to other rows, because blocks of a few would be over before they have begun. */
enum { APTC_EACH_BLOCKS = 1024, APTC_EACH_GROUPS = 64, APTC_EACH_SHARING = 4 /* of a multiprocessor, to keep memory busy */ };
typedef struct aptc_each { int64_t i, j, step; int32_t count; } aptc_each;

/* Threads side by side: a power of two */
APTC_BOTH int32_t aptc_groups(int64_t n)
{
    int32_t groups = 1;
    while (groups < APTC_EACH_GROUPS && groups * APTC_FOUR < n) groups *= 2;
    return groups;
}

/* The first row of thread t of block (bx, by), from which it goes on by `step`, and its columns */
APTC_BOTH aptc_each aptc_each_first(int64_t n, int32_t t, int64_t bx, int64_t by, int64_t row_blocks)
{
    const int32_t groups = aptc_groups(n), lanes = APTC_BLOCK / groups;
    aptc_each e;
    e.i = by * lanes + t / groups;
    e.j = (bx * groups + t % groups) * APTC_FOUR;
    e.step = row_blocks * lanes;
    e.count = (int32_t)aptc_max(0, aptc_min(APTC_FOUR, n - e.j));
    return e;
}

static int64_t aptc_columns(int64_t n) { return n < 1 ? 0 : aptc_ceil(n, (int64_t)aptc_groups(n) * APTC_FOUR); }

static int64_t aptc_row_blocks(int64_t rows, int64_t n)
{
    if (n < 1 || rows < 1) return 0;
    return aptc_min(aptc_ceil(rows, APTC_BLOCK / aptc_groups(n)), aptc_max(1, APTC_EACH_BLOCKS / aptc_columns(n)));
}

#define APTC_EACH_OF(t, job_rows, job_n)                                                                                \
    for (aptc_each e = aptc_each_first(job_n, t, APTC_BX, APTC_BY, APTC_ROWS); e.count > 0 && e.i < (job_rows); e.i += e.step)
#define APTC_EACH(job_rows, job_n) APTC_THREADS(t) APTC_EACH_OF(t, job_rows, job_n)
/* Element (i, j) by element */
#define APTC_EACH_ONE(job_rows, job_n)                                                                                  \
    APTC_EACH(job_rows, job_n) for (int64_t i = e.i, j = e.j; j < e.j + e.count; j++)
#define APTC_LAUNCH_ROWS(d, name, job, rows, n) APTC_LAUNCH(d, name, job, aptc_columns(n), aptc_row_blocks(rows, n))
#define APTC_LAUNCH_EACH(d, name, job) APTC_LAUNCH_ROWS(d, name, job, (job).rows, (job).n)
#define APTC_GET(v) aptc_get_four(&(v), e.i, e.j, e.count)
#define APTC_SET(v, four) aptc_set_four(&(v), e.i, e.j, e.count, &(four))
#define APTC_VECTOR_GET(x) aptc_vector_four(x, e.j, e.count)

/* The same for kernels that can also add up what salience asks for: sizes(APTC_ROWS, n), the sums of |x| over the rows of each
   block; NULL: none. APTC_ADD(x) is to be the last there, x the sums' terms. */
#define APTC_EACH_SIZED(job_rows, job_n)                                                                                \
    APTC_SHARED(aptc_four, aptc_part, APTC_BLOCK);                                                                      \
    APTC_PRIVATE(aptc_four, total);                                                                                     \
    APTC_THREADS(t) for (int32_t c = 0; c < APTC_FOUR; c++) APTC_MINE(total, t).x[c] = 0;                               \
    APTC_EACH(job_rows, job_n)
#define APTC_ADD(c, value) APTC_MINE(total, t).x[c] += (value)
#define APTC_SIZES_END(job_n)                                                                                           \
    if (job.sizes == NULL) return;                                                                                      \
    APTC_THREADS(t) aptc_part[t] = APTC_MINE(total, t);                                                                 \
    APTC_BARRIER;                                                                                                       \
    APTC_THREADS(t) aptc_add_lanes(job.sizes, aptc_part, job_n, t, APTC_BX, APTC_BY)

/* The sums of the block's threads that have the same columns, in their order */
APTC_DEVICE void aptc_add_lanes(float *sizes, const aptc_four *part, int64_t n, int32_t t, int64_t bx, int64_t by)
{
    const int32_t groups = aptc_groups(n);
    const aptc_each e = aptc_each_first(n, t, bx, by, 1);
    aptc_four sum = part[t];
    if (t >= groups) return;
    for (int32_t lane = t + groups; lane < APTC_BLOCK; lane += groups)
        for (int32_t c = 0; c < APTC_FOUR; c++) sum.x[c] += part[lane].x[c];
    for (int32_t c = 0; c < e.count; c++) sizes[by * n + e.j + c] = sum.x[c];
}

APTC_KERNEL_SHARING(aptc_finish_kernel, aptc_finish, APTC_EACH_SHARING)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        const aptc_four mask = APTC_VECTOR_GET(job.mask);
        aptc_four x = APTC_GET(job.z), bias = {{0, 0, 0, 0}}, added = {{0, 0, 0, 0}};
        if (job.bias != NULL) bias = APTC_VECTOR_GET(job.bias);
        if (job.residual.data != NULL) added = APTC_GET(job.residual);
        for (int32_t c = 0; c < APTC_FOUR; c++) {
            float slope;
            x.x[c] = (aptc_act(x.x[c] + bias.x[c], (int32_t)job.act, &slope) + added.x[c]) * mask.x[c];
            APTC_ADD(c, fabsf(x.x[c]));
        }
        APTC_SET(job.c, x);
    }
    APTC_SIZES_END(job.n);
}
APTC_LAUNCHER(aptc_finish_kernel, aptc_finish)

/* to(rows, n) = from in another type, 0 where it has no data; of a transposed `from` (rows are its columns) as well */
typedef struct aptc_cast { aptc_view to, from; int64_t rows, n; } aptc_cast;

APTC_KERNEL(aptc_cast_kernel, aptc_cast)
{
    APTC_EACH(job.rows, job.n) {
        aptc_four x = {{0, 0, 0, 0}};
        if (job.from.data != NULL) x = APTC_GET(job.from);
        APTC_SET(job.to, x);
    }
}
APTC_LAUNCHER(aptc_cast_kernel, aptc_cast)

APTC_KERNEL_SHARING(aptc_act_backward_kernel, aptc_act_backward, APTC_EACH_SHARING)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        const aptc_four mask = APTC_VECTOR_GET(job.mask), da = APTC_GET(job.da);
        aptc_four u = {{0, 0, 0, 0}};
        if (job.act >= 0) u = APTC_GET(job.pre);
        for (int32_t c = 0; c < APTC_FOUR; c++) {
            float slope = 1;
            if (job.act >= 0) (void)aptc_act(u.x[c], (int32_t)job.act, &slope);
            u.x[c] = da.x[c] * slope * mask.x[c];
            APTC_ADD(c, fabsf(job.written ? u.x[c] : da.x[c]));
        }
        APTC_SET(job.du, u);
    }
    APTC_SIZES_END(job.n);
}
APTC_LAUNCHER(aptc_act_backward_kernel, aptc_act_backward)

APTC_KERNEL(aptc_residual_kernel, aptc_residual)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        const aptc_four mask = APTC_VECTOR_GET(job.mask), x = APTC_GET(job.x);
        aptc_four y = APTC_GET(job.r);
        for (int32_t c = 0; c < APTC_FOUR; c++) {
            y.x[c] = (x.x[c] + y.x[c]) * mask.x[c];
            APTC_ADD(c, fabsf(job.written ? y.x[c] : x.x[c]));
        }
        APTC_SET(job.y, y);
    }
    APTC_SIZES_END(job.n);
}
APTC_LAUNCHER(aptc_residual_kernel, aptc_residual)

APTC_KERNEL_SHARING(aptc_gate_forward_kernel, aptc_gate, APTC_EACH_SHARING)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        const aptc_four mask = APTC_VECTOR_GET(job.mask), a = APTC_GET(job.a);
        aptc_four h = APTC_GET(job.v);
        for (int32_t c = 0; c < APTC_FOUR; c++) {
            h.x[c] = h.x[c] * a.x[c] * mask.x[c];
            APTC_ADD(c, fabsf(h.x[c]));
        }
        APTC_SET(job.h, h);
    }
    APTC_SIZES_END(job.n);
}
APTC_LAUNCHER(aptc_gate_forward_kernel, aptc_gate)

APTC_KERNEL_SHARING(aptc_gate_backward_kernel, aptc_gate, APTC_EACH_SHARING)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        const aptc_four mask = APTC_VECTOR_GET(job.mask), given = APTC_GET(job.dh);
        aptc_four u = APTC_GET(job.u), v = APTC_GET(job.v);
        for (int32_t c = 0; c < APTC_FOUR; c++) {
            float slope;
            const float act = aptc_act(u.x[c], (int32_t)job.act, &slope), dh = given.x[c] * mask.x[c];
            u.x[c] = dh * v.x[c] * slope;
            v.x[c] = dh * act;
            APTC_ADD(c, fabsf(given.x[c]));
        }
        APTC_SET(job.dv, v);
        APTC_SET(job.du, u);
    }
    APTC_SIZES_END(job.n);
}
APTC_LAUNCHER(aptc_gate_backward_kernel, aptc_gate)

APTC_KERNEL(aptc_tanh_forward_kernel, apti_tanh_job)
{
    APTC_EACH_ONE(job.rows, job.n) job.out[i * job.ld + j] = tanhf(job.x[i * job.ld + j]);
}
APTC_LAUNCHER(aptc_tanh_forward_kernel, apti_tanh_job)

APTC_KERNEL(aptc_tanh_backward_kernel, apti_tanh_job)
{
    APTC_EACH_ONE(job.rows, job.n) {
        const float y = job.x[i * job.ld + j];
        job.out[i * job.ld + j] = job.dy[i * job.ld + j] * (1.0f - y * y);
    }
}
APTC_LAUNCHER(aptc_tanh_backward_kernel, apti_tanh_job)

/* x(rows, n) *= s */
typedef struct aptc_scale { aptc_view x; int64_t rows, n; float s, unused; } aptc_scale;

APTC_KERNEL(aptc_scale_kernel, aptc_scale)
{
    APTC_EACH(job.rows, job.n) {
        aptc_four x = APTC_GET(job.x);
        for (int32_t c = 0; c < APTC_FOUR; c++) x.x[c] *= job.s;
        APTC_SET(job.x, x);
    }
}
APTC_LAUNCHER(aptc_scale_kernel, aptc_scale)

/* Long vectors: a thread per element of each round. */
enum { APTC_VECTOR_BLOCKS = 1024 };
#define APTC_VECTOR(count)                                                                                              \
    APTC_THREADS(t) for (int64_t i = APTC_BX * APTC_BLOCK + t; i < (count); i += (int64_t)APTC_VECTOR_BLOCKS * APTC_BLOCK)
#define APTC_LAUNCH_VECTOR(d, name, job, count) \
    APTC_LAUNCH(d, name, job, aptc_min(aptc_ceil(count, APTC_BLOCK), APTC_VECTOR_BLOCKS), 1)

typedef struct aptc_adam {
    apti_adam_job op;
    const aptc_scalars *given;        /* counts instead of the op's */
} aptc_adam;

APTC_KERNEL(aptc_adam_kernel, aptc_adam)
{
    const float b1 = job.op.beta1, b2 = job.op.beta2, step = job.given->step_size, eps = job.given->eps, decay = job.given->decay;
    APTC_VECTOR(job.op.n) {
        const float g = job.op.g[i] * job.given->grad_scale, w = job.op.w[i];
        float m = b1 * job.op.m[i] + (1 - b1) * g, v = b2 * job.op.v[i] + (1 - b2) * g * g;
        if (fabsf(m) < 7.8886091e-31f) m = 0;          /* 2^-100: as on the CPU, moments do not decay into denormals */
        if (v < 7.8886091e-31f) v = 0;
        job.op.m[i] = m;
        job.op.v[i] = v;
        const bool kept = job.op.mask == NULL || (job.op.mask[i / 64] >> (i % 64) & 1) != 0;
        job.op.w[i] = kept ? w - (step * m / (sqrtf(v) + eps) + decay * w) : 0.0f;
    }
}
APTC_LAUNCHER(aptc_adam_kernel, aptc_adam)

typedef struct aptc_give { aptc_scalars *to, value; } aptc_give;

APTC_KERNEL(aptc_give_kernel, aptc_give)
{
    APTC_THREADS(t) if (t == 0 && APTC_BX == 0) *job.to = job.value;
}
APTC_LAUNCHER(aptc_give_kernel, aptc_give)

/* The step's scalars go to the device once for all arrays that want the same: the arrays' own launches are then those of the step
   before, and can be graphs. */
static bool aptc_adam_op(aptc_device *d, const apti_adam_job *op)
{
    const aptc_scalars value = {op->grad_scale, op->step_size, op->eps, op->decay};
    int32_t i = 0;
    while (i < d->givens && memcmp(&d->given[i], &value, sizeof value) != 0) i++;
    if (i == d->givens) {
        i = d->givens % APTC_SCALARS;
        d->givens = i + 1;
        d->given[i] = value;
        const aptc_give give = {d->scalars + i, value};
        APTC_LAUNCH(d, aptc_give_kernel, give, 1, 1);
    }
    aptc_adam job;
    memset(&job, 0, sizeof job);
    job.op = *op;
    job.op.grad_scale = job.op.step_size = job.op.eps = job.op.decay = 0;
    job.given = d->scalars + i;
    APTC_LAUNCH_VECTOR(d, aptc_adam_kernel, job, op->n);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Sums over rows and over everything

   In two steps with a fixed order: blocks add up a chunk each in float, then the chunks are added in double.
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    APTC_FOLD_COLUMNS = 8, APTC_FOLD_LANES = APTC_BLOCK / APTC_FOLD_COLUMNS      /* many chunks, read side by side */
};

/* acc(n) += mask * sum over the chunks of partial(chunks, n); mask NULL: ones; binary: every mask that is not 0 counts as 1 */
typedef struct aptc_fold { float *acc; const float *partial, *mask; int64_t chunks, stride, n, binary; } aptc_fold;

/* Block: APTC_FOLD_COLUMNS columns; APTC_FOLD_LANES threads share a column */
APTC_KERNEL(aptc_fold_kernel, aptc_fold)
{
    APTC_SHARED(double, sum, APTC_BLOCK);
    APTC_THREADS(t) {
        const int64_t j = APTC_BX * APTC_FOLD_COLUMNS + t % APTC_FOLD_COLUMNS;
        double total = 0;
        for (int64_t c = t / APTC_FOLD_COLUMNS; j < job.n && c < job.chunks; c += APTC_FOLD_LANES)
            total += (double)job.partial[c * job.stride + j];
        sum[t] = total;
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const int64_t j = APTC_BX * APTC_FOLD_COLUMNS + t;
        double total = 0;
        for (int32_t lane = 0; t < APTC_FOLD_COLUMNS && lane < APTC_FOLD_LANES; lane++)
            total += sum[lane * APTC_FOLD_COLUMNS + t];
        if (t < APTC_FOLD_COLUMNS && j < job.n) {
            double factor = job.mask != NULL ? (double)job.mask[j] : 1.0;
            if (job.binary != 0 && factor != 0) factor = 1;
            job.acc[j] = (float)((double)job.acc[j] + factor * total);
        }
    }
}
APTC_LAUNCHER(aptc_fold_kernel, aptc_fold)
#define APTC_LAUNCH_FOLD(d, fold) APTC_LAUNCH(d, aptc_fold_kernel, fold, aptc_ceil((fold).n, APTC_FOLD_COLUMNS), 1)

/* Sums over the rows of x, |x|, x^2, or of a norm's x * (z - mean) * rstd */
typedef struct aptc_column {
    aptc_view x, z;                   /* z: data NULL, plain sums */
    const float *stats;
    float *sizes;
    int64_t rows, n, kind;            /* apti_column_kind */
} aptc_column;

APTC_KERNEL(aptc_column_kernel, aptc_column)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        const aptc_four x = APTC_GET(job.x);
        aptc_four z = {{0, 0, 0, 0}};
        if (job.z.data != NULL) z = APTC_GET(job.z);
        for (int32_t c = 0; c < APTC_FOUR; c++) {
            const float one = x.x[c];
            if (job.z.data != NULL) APTC_ADD(c, one * (z.x[c] - job.stats[2 * e.i]) * job.stats[2 * e.i + 1]);
            else APTC_ADD(c, job.kind == APTI_COLUMN_ABS ? fabsf(one) : job.kind == APTI_COLUMN_SQUARE ? one * one : one);
        }
    }
    APTC_SIZES_END(job.n);
}
APTC_LAUNCHER(aptc_column_kernel, aptc_column)

/* Bytes of the workspace for the sums of each block */
static int64_t aptc_sizes_bytes(int64_t rows, int64_t n) { return aptc_row_blocks(rows, n) * n * (int64_t)sizeof(float); }

/* acc(n) += mask * column sums; false: the workspace is too small */
static bool aptc_column_run(aptc_device *d, float *acc, aptc_column *job, const float *mask, bool binary)
{
    job->sizes = (float *)aptc_take(d, aptc_sizes_bytes(job->rows, job->n));
    if (job->sizes == NULL) return false;
    const aptc_fold fold = {acc, job->sizes, mask, aptc_row_blocks(job->rows, job->n), job->n, job->n, binary};
    APTC_LAUNCH_EACH(d, aptc_column_kernel, *job);
    APTC_LAUNCH_FOLD(d, fold);
    return true;
}

static bool aptc_column_op(aptc_device *d, const apti_column_job *op)
{
    aptc_column job;
    memset(&job, 0, sizeof job);
    job.x = aptc_in(d, op->x, op->ldx, op->rows, op->n);
    job.rows = op->rows;
    job.n = op->n;
    job.kind = op->kind;
    return aptc_column_run(d, op->acc, &job, NULL, false);
}

/* ---- sums of |x| inside the kernel that writes or reads x

   Salience adds up activations right behind the operation that makes them, and gradients behind the one that makes them or in
   front of the one that reads them; see "What waits". */

/* Room for the sums of a launch of so many blocks; NULL: none is asked for, or there is no room */
static float *aptc_sizes_for(aptc_device *d, const apti_column_job *sum, int64_t blocks)
{
    if (sum == NULL) return NULL;
    return (float *)aptc_take(d, blocks * sum->n * (int64_t)sizeof(float));
}

/* Behind the operation's last launch: acc += the sums, or all of it where there was no room */
static void aptc_sizes_add(aptc_device *d, const float *sizes, const apti_column_job *sum, int64_t blocks)
{
    if (sum == NULL) return;
    if (sizes == NULL) {
        d->used = 0;
        (void)aptc_column_op(d, sum);             /* which has room: see aptc_sum_op */
        return;
    }
    const aptc_fold fold = {sum->acc, sizes, NULL, blocks, sum->n, sum->n, 0};
    APTC_LAUNCH_FOLD(d, fold);
}

static void aptc_finish_run(aptc_device *d, aptc_finish *f, const apti_column_job *sum)
{
    const int64_t blocks = aptc_row_blocks(f->rows, f->n);
    f->sizes = aptc_sizes_for(d, sum, blocks);
    APTC_LAUNCH_EACH(d, aptc_finish_kernel, *f);
    aptc_sizes_add(d, f->sizes, sum, blocks);
}

static aptc_gate aptc_gate_of(aptc_device *d, const apti_gate_job *op, bool backward)
{
    aptc_gate g;
    memset(&g, 0, sizeof g);
    g.v = aptc_in(d, op->v, op->ldv, op->rows, op->n);
    g.mask = op->mask;
    g.rows = op->rows;
    g.n = op->n;
    g.act = op->act;
    if (!backward) {
        g.a = aptc_in(d, op->a, op->lda, op->rows, op->n);
        g.h = aptc_out_over(d, op->h, op->ldh, op->rows, op->n, op->a, &g.a);
        return g;
    }
    g.u = aptc_in(d, op->u, op->ldu, op->rows, op->n);
    g.dh = aptc_in(d, op->dh, op->lddh, op->rows, op->n);
    g.du = aptc_out_over(d, op->du, op->lddu, op->rows, op->n, op->dh, &g.dh);
    g.dv = aptc_out_over(d, op->dv, op->lddv, op->rows, op->n, op->dh, &g.dh);
    return g;
}

static void aptc_gate_run(aptc_device *d, aptc_gate *g, bool backward, const apti_column_job *sum)
{
    const int64_t blocks = aptc_row_blocks(g->rows, g->n);
    g->sizes = aptc_sizes_for(d, sum, blocks);
    if (backward) APTC_LAUNCH_EACH(d, aptc_gate_backward_kernel, *g);
    else APTC_LAUNCH_EACH(d, aptc_gate_forward_kernel, *g);
    aptc_sizes_add(d, g->sizes, sum, blocks);
}

static void aptc_gate_forward_op(aptc_device *d, const apti_gate_job *op)
{
    d->waiting.gate = aptc_gate_of(d, op, false);
    aptc_wait(d, APTC_GATE, op->h, op->ldh, op->rows, op->n);
}

static void aptc_gate_backward_op(aptc_device *d, const apti_gate_job *op, const apti_column_job *sum)
{
    aptc_gate g = aptc_gate_of(d, op, true);
    aptc_gate_run(d, &g, true, sum);
}

static void aptc_act_backward_run(aptc_device *d, aptc_act_backward *a, const apti_column_job *sum)
{
    const int64_t blocks = aptc_row_blocks(a->rows, a->n);
    a->sizes = aptc_sizes_for(d, sum, blocks);
    APTC_LAUNCH_EACH(d, aptc_act_backward_kernel, *a);
    aptc_sizes_add(d, a->sizes, sum, blocks);
}

/* sum: of what it reads; without one it waits for one of what it writes. */
static void aptc_act_backward_op(aptc_device *d, const apti_act_job *op, const apti_column_job *sum)
{
    aptc_act_backward a;
    memset(&a, 0, sizeof a);
    a.da = aptc_in(d, op->da, op->ldda, op->rows, op->n);
    a.pre = op->act >= 0 ? aptc_in(d, op->pre, op->ld_pre, op->rows, op->n) : a.da;
    a.du = aptc_out_over(d, op->du, op->lddu, op->rows, op->n, op->da, &a.da);
    a.mask = op->mask;
    a.rows = op->rows;
    a.n = op->n;
    a.act = op->act;
    a.written = sum == NULL;
    if (sum != NULL) {
        aptc_act_backward_run(d, &a, sum);
        return;
    }
    d->waiting.act = a;
    aptc_wait(d, APTC_ACT, op->du, op->lddu, op->rows, op->n);
}

static void aptc_residual_run(aptc_device *d, aptc_residual *r, const apti_column_job *sum)
{
    const int64_t blocks = aptc_row_blocks(r->rows, r->n);
    r->sizes = aptc_sizes_for(d, sum, blocks);
    APTC_LAUNCH_EACH(d, aptc_residual_kernel, *r);
    aptc_sizes_add(d, r->sizes, sum, blocks);
}

/* As aptc_act_backward_op */
static void aptc_residual_op(aptc_device *d, const apti_residual_job *op, const apti_column_job *sum)
{
    aptc_residual r;
    memset(&r, 0, sizeof r);
    r.x = aptc_in(d, op->x, op->ldx, op->rows, op->n);
    r.r = aptc_in(d, op->r, op->ldr, op->rows, op->n);
    r.y = op->y == op->r ? r.r : aptc_out_over(d, op->y, op->ldy, op->rows, op->n, op->x, &r.x);
    r.mask = op->mask;
    r.rows = op->rows;
    r.n = op->n;
    r.written = sum == NULL;
    if (sum != NULL) {
        aptc_residual_run(d, &r, sum);
        return;
    }
    d->waiting.residual = r;
    aptc_wait(d, APTC_RESIDUAL, op->y, op->ldy, op->rows, op->n);
}

/* The rows of a matrix of halves, with their padding if any; or a vector of floats, which is cut into rows, so that blocks have
   some, and what is left of it. */
static void aptc_scale_op(aptc_device *d, const apti_scale_job *op)
{
    const int32_t i = aptc_half_behind(d, (uintptr_t)op->x);
    if (i < d->halves && op->n % d->half[i].ld == 0) {
        const aptc_half *h = &d->half[i];
        const aptc_scale job = {aptc_half_part(h, op->x, h->ld, op->n / h->ld, h->n), op->n / h->ld, h->n, op->s, 0};
        if (job.x.data != NULL) {
            APTC_LAUNCH_EACH(d, aptc_scale_kernel, job);
            return;
        }
    }
    const int64_t width = APTC_EACH_GROUPS * APTC_FOUR, rows = op->n / width, rest = op->n % width;
    const aptc_view x = aptc_in(d, op->x, op->n, 1, op->n);
    const aptc_scale body = {{x.data, width, x.type}, rows, width, op->s, 0};
    const aptc_scale tail = {{(char *)x.data + rows * width * aptc_size((apt_dtype)x.type), rest, x.type}, 1, rest, op->s, 0};
    if (rows > 0) APTC_LAUNCH_EACH(d, aptc_scale_kernel, body);
    if (rest > 0) APTC_LAUNCH_EACH(d, aptc_scale_kernel, tail);
}

static void aptc_copy_op(aptc_device *d, const apti_copy_job *op)
{
    aptc_cast job;
    memset(&job, 0, sizeof job);
    job.from = aptc_in(d, op->x, op->ldx, op->rows, op->n);
    job.rows = op->rows;
    job.n = op->n;
    job.to = aptc_out_as(d, op->y, op->ldy, op->rows, op->n, op->x != NULL);        /* zeros: sums begin with them */
    APTC_LAUNCH_EACH(d, aptc_cast_kernel, job);
}

/* partial[block] = sum of squares of the block's elements */
typedef struct aptc_squares { double *partial; const float *x; int64_t n; } aptc_squares;

APTC_KERNEL(aptc_squares_kernel, aptc_squares)
{
    APTC_SHARED(double, sum, APTC_BLOCK);
    APTC_THREADS(t) sum[t] = 0;
    APTC_VECTOR(job.n) sum[t] += (double)job.x[i] * (double)job.x[i];
    APTC_BARRIER;
    APTC_THREADS(t) {
        double total = 0;
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += sum[k];
        if (t == 0) job.partial[APTC_BX] = total;
    }
}
APTC_LAUNCHER(aptc_squares_kernel, aptc_squares)

/* result[0] += the sum of partial[count]; of pairs: result[1] += that of the second halves */
typedef struct aptc_total { double *result; const double *partial; int64_t count, columns; } aptc_total;

APTC_KERNEL(aptc_total_kernel, aptc_total)
{
    APTC_SHARED(double, sum, APTC_BLOCK);
    for (int64_t c = 0; c < job.columns; c++) {
        APTC_THREADS(t) {
            sum[t] = 0;
            for (int64_t i = t; i < job.count; i += APTC_BLOCK) sum[t] += job.partial[i * job.columns + c];
        }
        APTC_BARRIER;
        APTC_THREADS(t) {
            double total = APTC_BX == 0 && t == 0 ? job.result[c] : 0.0;
            for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += sum[k];
            if (t == 0) job.result[c] = total;
        }
        APTC_BARRIER;
    }
}
APTC_LAUNCHER(aptc_total_kernel, aptc_total)

static bool aptc_squares_op(aptc_device *d, const apti_squares_job *op)
{
    const int64_t blocks = aptc_min(aptc_ceil(op->n, APTC_BLOCK), APTC_VECTOR_BLOCKS);
    double *partial = (double *)aptc_take(d, blocks * (int64_t)sizeof(double));
    if (partial == NULL) return false;
    const aptc_squares job = {partial, op->x, op->n};
    const aptc_total total = {op->result, partial, blocks, 1};
    APTC_LAUNCH_VECTOR(d, aptc_squares_kernel, job, op->n);
    APTC_LAUNCH(d, aptc_total_kernel, total, 1, 1);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Norms: a warp per row, and blocks that go on to further rows
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTC_NORM_BLOCKS = 1024 };     /* as many as a device holds */

/* first, first + APTC_WARPS, ...: the first rows of a block's rounds */
#define APTC_NORM_ROUNDS(first) \
    for (int64_t first = APTC_BY * APTC_WARPS; first < job.rows; first += APTC_ROWS * APTC_WARPS)

/* Thread t's share of the block's sums of |x(rows, d)| over the rows of a round: columns t, t + APTC_BLOCK, ... */
APTC_DEVICE void aptc_norm_sizes(const aptc_norm *job, const aptc_view *x, int64_t first, int64_t by, int32_t t)
{
    const int64_t end = aptc_min(job->rows, first + APTC_WARPS);
    float *sizes = job->sizes + by * job->d;
    for (int64_t j = t; j < job->d; j += APTC_BLOCK) {
        float total = first == by * APTC_WARPS ? 0.0f : sizes[j];
        for (int64_t i = first; i < end; i++) total += fabsf(aptc_get(x, i, j));
        sizes[j] = total;
    }
}

/* Thread t's columns of its warp's row of a round, four by four */
#define APTC_NORM_COLUMNS(t, j, count)                                                                                  \
    for (int64_t j = (t) % APTC_WARP * APTC_FOUR; row < job->rows && j < job->d; j += APTC_WARP * APTC_FOUR)            \
        for (int32_t count = (int32_t)aptc_min(APTC_FOUR, job->d - j), once = 1; once == 1; once = 0)

/* 1 where the column takes part in the statistics */
APTC_DEVICE aptc_four aptc_alive(const float *mask, int64_t j, int32_t count)
{
    aptc_four alive = aptc_vector_four(mask, j, count);
    for (int32_t c = 0; c < APTC_FOUR; c++) alive.x[c] = c < count && alive.x[c] != 0 ? 1.0f : 0.0f;
    return alive;
}

/* What is multiplied with gamma and beta: the mask; of RMS norms whether there is any */
APTC_DEVICE aptc_four aptc_norm_factor(const aptc_norm *job, int64_t j, int32_t count)
{
    return job->rms ? aptc_alive(job->mask, j, count) : aptc_vector_four(job->mask, j, count);
}

APTC_DEVICE float aptc_sum_four(const aptc_four *f) { return f->x[0] + f->x[1] + (f->x[2] + f->x[3]); }

/* A round of rows from `first` on */
APTC_DEVICE void aptc_norm_forward_rows(const aptc_norm *job, int64_t first)
{
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(float, number);
    APTC_PRIVATE(float, mean);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        APTC_MINE(sum, t) = APTC_MINE(number, t) = 0;
        APTC_NORM_COLUMNS(t, j, count) {
            const aptc_four alive = aptc_alive(job->mask, j, count);
            aptc_four z = aptc_get_four(&job->z, row, j, count);
            for (int32_t c = 0; c < APTC_FOUR; c++)
                if (alive.x[c] == 0) z.x[c] = 0;
            APTC_MINE(sum, t) += aptc_sum_four(&z);
            APTC_MINE(number, t) += aptc_sum_four(&alive);
        }
    }
    APTC_WARP_SUM(sum);
    APTC_WARP_SUM(number);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        APTC_MINE(mean, t) = job->rms || APTC_MINE(number, t) == 0 ? 0.0f : APTC_MINE(sum, t) / APTC_MINE(number, t);
        APTC_MINE(sum, t) = 0;
        APTC_NORM_COLUMNS(t, j, count) {
            const aptc_four alive = aptc_alive(job->mask, j, count);
            aptc_four z = aptc_get_four(&job->z, row, j, count);
            for (int32_t c = 0; c < APTC_FOUR; c++) {
                const float x = z.x[c] - APTC_MINE(mean, t);
                z.x[c] = alive.x[c] != 0 ? x * x : 0.0f;
            }
            APTC_MINE(sum, t) += aptc_sum_four(&z);
        }
    }
    APTC_WARP_SUM(sum);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        const double number_t = (double)APTC_MINE(number, t);             /* what a row has in common had better not be off */
        const double variance = number_t == 0 ? 0.0 : (double)APTC_MINE(sum, t) / number_t + (double)job->eps;
        const float rstd = variance == 0 ? 0.0f : (float)(1.0 / sqrt(variance)), mu = APTC_MINE(mean, t);
        APTC_NORM_COLUMNS(t, j, count) {
            const aptc_four m = aptc_norm_factor(job, j, count), gamma = aptc_vector_four(job->gamma, j, count);
            const aptc_four beta = aptc_vector_four(job->beta, j, count);
            aptc_four z = aptc_get_four(&job->z, row, j, count);
            for (int32_t c = 0; c < APTC_FOUR; c++) {
                z.x[c] = gamma.x[c] * m.x[c] * ((z.x[c] - mu) * rstd);
                if (job->beta != NULL) z.x[c] += beta.x[c] * m.x[c];
            }
            aptc_set_four(&job->y, row, j, count, &z);
        }
        if (job->stats != NULL && row < job->rows && t % APTC_WARP == 0) {
            job->stats[2 * row] = mu;
            job->stats[2 * row + 1] = rstd;
        }
    }
}

APTC_KERNEL(aptc_norm_forward_kernel, aptc_norm)
{
    APTC_NORM_ROUNDS(first) {
        aptc_norm_forward_rows(&job, first);
        if (job.sizes == NULL) continue;
        APTC_BARRIER;
        APTC_THREADS(t) aptc_norm_sizes(&job, &job.y, first, APTC_BY, t);
    }
}
APTC_LAUNCHER(aptc_norm_forward_kernel, aptc_norm)

APTC_DEVICE void aptc_norm_backward_rows(const aptc_norm *job, int64_t first)
{
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(float, dot);
    APTC_PRIVATE(float, number);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        APTC_MINE(sum, t) = APTC_MINE(dot, t) = APTC_MINE(number, t) = 0;
        APTC_NORM_COLUMNS(t, j, count) {
            const aptc_four alive = aptc_alive(job->mask, j, count), m = aptc_norm_factor(job, j, count);
            const aptc_four gamma = aptc_vector_four(job->gamma, j, count);
            aptc_four z = aptc_get_four(&job->z, row, j, count), dy = aptc_get_four(&job->dy, row, j, count);
            for (int32_t c = 0; c < APTC_FOUR; c++) {
                const float x = (z.x[c] - job->saved[2 * row]) * job->saved[2 * row + 1];
                dy.x[c] = alive.x[c] != 0 ? dy.x[c] * (gamma.x[c] * m.x[c]) : 0.0f;
                z.x[c] = alive.x[c] != 0 ? dy.x[c] * x : 0.0f;
            }
            APTC_MINE(sum, t) += aptc_sum_four(&dy);
            APTC_MINE(dot, t) += aptc_sum_four(&z);
            APTC_MINE(number, t) += aptc_sum_four(&alive);
        }
    }
    APTC_WARP_SUM(sum);
    APTC_WARP_SUM(dot);
    APTC_WARP_SUM(number);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        const float n = APTC_MINE(number, t) > 1 ? APTC_MINE(number, t) : 1.0f;
        const float average = job->rms ? 0.0f : APTC_MINE(sum, t) / n, slope = APTC_MINE(dot, t) / n;
        APTC_NORM_COLUMNS(t, j, count) {
            const aptc_four alive = aptc_alive(job->mask, j, count), m = aptc_norm_factor(job, j, count);
            const aptc_four gamma = aptc_vector_four(job->gamma, j, count), dy = aptc_get_four(&job->dy, row, j, count);
            const float rstd = job->saved[2 * row + 1];
            aptc_four z = aptc_get_four(&job->z, row, j, count);
            for (int32_t c = 0; c < APTC_FOUR; c++) {
                const float x = (z.x[c] - job->saved[2 * row]) * rstd, g = dy.x[c] * (gamma.x[c] * m.x[c]);
                z.x[c] = alive.x[c] != 0 ? rstd * (g - average - x * slope) : 0.0f;
            }
            aptc_set_four(&job->y, row, j, count, &z);
        }
    }
}

APTC_KERNEL(aptc_norm_backward_kernel, aptc_norm)
{
    APTC_NORM_ROUNDS(first) {
        if (job.sizes != NULL) {
            APTC_THREADS(t) aptc_norm_sizes(&job, &job.dy, first, APTC_BY, t);
            APTC_BARRIER;                         /* dz may be dy */
        }
        aptc_norm_backward_rows(&job, first);
    }
}
APTC_LAUNCHER(aptc_norm_backward_kernel, aptc_norm)

static aptc_norm aptc_norm_of(const apti_norm_job *op)
{
    aptc_norm n;
    memset(&n, 0, sizeof n);
    n.stats = op->stats;
    n.saved = op->saved;
    n.gamma = op->gamma;
    n.beta = op->beta;
    n.mask = op->mask;
    n.rows = op->rows;
    n.d = op->d;
    n.rms = op->rms;
    n.eps = op->eps;
    return n;
}

static int64_t aptc_norm_blocks(const aptc_norm *n) { return aptc_min(aptc_ceil(n->rows, APTC_WARPS), APTC_NORM_BLOCKS); }

static void aptc_norm_forward_run(aptc_device *d, aptc_norm *n, const apti_column_job *sum)
{
    const int64_t blocks = aptc_norm_blocks(n);
    n->sizes = aptc_sizes_for(d, sum, blocks);
    APTC_LAUNCH(d, aptc_norm_forward_kernel, *n, 1, blocks);
    aptc_sizes_add(d, n->sizes, sum, blocks);
}

static void aptc_norm_forward_op(aptc_device *d, const apti_norm_job *op)
{
    aptc_norm n = aptc_norm_of(op);
    n.z = aptc_in(d, op->z, op->ldz, op->rows, op->d);
    n.y = aptc_out_over(d, op->y, op->ldy, op->rows, op->d, op->z, &n.z);
    aptc_out_floats(d, op->stats, 2 * op->rows);
    d->waiting.norm = n;
    aptc_wait(d, APTC_NORM, op->y, op->ldy, op->rows, op->d);
}

/* dgamma, dbeta and, where it has no room in passing, the sum of |dy| first: dz may be dy. They use the same room in turn. */
static bool aptc_norm_backward_op(aptc_device *d, const apti_norm_job *op, const apti_column_job *sum)
{
    const size_t used = d->used;
    aptc_norm n = aptc_norm_of(op);
    aptc_column job;
    memset(&job, 0, sizeof job);
    job.x = n.dy = aptc_in(d, op->dy, op->lddy, op->rows, op->d);
    n.z = aptc_in(d, op->z, op->ldz, op->rows, op->d);
    job.rows = op->rows;
    job.n = op->d;
    if (op->dbeta != NULL && !aptc_column_run(d, op->dbeta, &job, op->mask, false)) return false;
    job.z = n.z;
    job.stats = op->saved;
    d->used = used;
    if (op->dgamma != NULL && !aptc_column_run(d, op->dgamma, &job, op->mask, op->rms)) return false;
    if (op->y == NULL) return true;
    const int64_t blocks = aptc_norm_blocks(&n);
    n.y = aptc_out_over(d, op->y, op->ldy, op->rows, op->d, op->dy, &n.dy);
    n.sizes = aptc_sizes_for(d, sum, blocks);
    if (n.sizes == NULL) aptc_sizes_add(d, NULL, sum, 0);
    APTC_LAUNCH(d, aptc_norm_backward_kernel, n, 1, blocks);
    if (n.sizes != NULL) aptc_sizes_add(d, n.sizes, sum, blocks);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Positions
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct aptc_rotary {
    aptc_view x;
    float *table;
    const float *angles, *frequency;
    const int32_t *positions;
    int64_t rows, n;                  /* n: pairs of a row */
    int32_t half, interleaved;
    float direction;
} aptc_rotary;

APTC_KERNEL(aptc_rotary_table_kernel, aptc_rotary)
{
    APTC_EACH_ONE(job.rows, job.n) {
        const float angle = (float)job.positions[i] * job.frequency[j];
        job.table[2 * i * job.half + j] = cosf(angle);
        job.table[(2 * i + 1) * job.half + j] = sinf(angle);
    }
}
APTC_LAUNCHER(aptc_rotary_table_kernel, aptc_rotary)

APTC_KERNEL(aptc_rotary_kernel, aptc_rotary)
{
    APTC_EACH_ONE(job.rows, job.n) {
        const int64_t head = j / job.half, k = j % job.half;
        const int64_t step = job.interleaved ? 2 : 1, partner = job.interleaved ? 1 : job.half;
        const int64_t at = head * 2 * job.half + k * step;
        const float co = job.angles[2 * i * job.half + k], si = job.direction * job.angles[(2 * i + 1) * job.half + k];
        const float a = aptc_get(&job.x, i, at), b = aptc_get(&job.x, i, at + partner);
        aptc_set(&job.x, i, at, a * co - b * si);
        aptc_set(&job.x, i, at + partner, b * co + a * si);
    }
}
APTC_LAUNCHER(aptc_rotary_kernel, aptc_rotary)

static bool aptc_rotary_op(aptc_device *d, const apti_rotary_job *op, bool table)
{
    aptc_rotary job;
    memset(&job, 0, sizeof job);
    if (table) aptc_out_floats(d, op->table, op->rows * op->op->dim);
    else job.x = aptc_in(d, op->x, op->ldx, op->rows, (int64_t)op->op->heads * op->op->dim);
    job.table = op->table;
    job.angles = op->op->table;
    job.frequency = op->frequency;
    job.positions = op->positions;
    job.rows = op->rows;
    job.half = op->op->dim / 2;
    job.n = table ? job.half : (int64_t)op->op->heads * job.half;
    job.interleaved = op->op->interleaved;
    job.direction = op->direction;
    if (table) APTC_LAUNCH_EACH(d, aptc_rotary_table_kernel, job);
    else APTC_LAUNCH_EACH(d, aptc_rotary_kernel, job);
    return true;
}

typedef struct aptc_relative {
    float *out;
    const float *in;
    const int32_t *column, *bucket;
    int64_t rows, n, wide, table_heads;
} aptc_relative;

/* Rows: heads; columns: distances */
APTC_KERNEL(aptc_relative_forward_kernel, aptc_relative)
{
    APTC_EACH_ONE(job.rows, job.n)
        job.out[i * job.wide + j] = job.in[job.bucket[j] * job.table_heads + (job.column != NULL ? job.column[i] : i)];
}
APTC_LAUNCHER(aptc_relative_forward_kernel, aptc_relative)

/* Rows: heads; columns: buckets, each of which takes its distances in order */
APTC_KERNEL(aptc_relative_backward_kernel, aptc_relative)
{
    APTC_EACH_ONE(job.rows, job.n) {
        float total = 0;
        for (int64_t u = 0; u < job.wide; u++)
            if (job.bucket[u] == j) total += job.in[i * job.wide + u];
        job.out[j * job.table_heads + (job.column != NULL ? job.column[i] : i)] += total;
    }
}
APTC_LAUNCHER(aptc_relative_backward_kernel, aptc_relative)

static bool aptc_relative_op(aptc_device *d, const apti_relative_job *op, bool backward)
{
    aptc_relative job;
    memset(&job, 0, sizeof job);
    job.out = op->out;
    job.in = op->in;
    job.column = op->op->column;
    job.bucket = op->op->bucket;
    job.rows = op->op->heads;
    job.wide = 2 * (int64_t)op->op->span - 1;
    job.n = backward ? op->op->buckets : job.wide;
    job.table_heads = op->op->table_heads;
    if (backward) APTC_LAUNCH_EACH(d, aptc_relative_backward_kernel, job);
    else APTC_LAUNCH_EACH(d, aptc_relative_forward_kernel, job);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Rows that are looked up
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct aptc_embed { apti_embed_job op; aptc_view x; } aptc_embed;

APTC_KERNEL(aptc_embed_kernel, aptc_embed)
{
    APTC_EACH_ONE(job.op.rows, job.op.d) {
        float x = 0;
        for (int32_t k = 0; k < 3; k++) {
            if (job.op.table[k].data == NULL) continue;
            const int64_t id = job.op.table[k].id != NULL ? job.op.table[k].id[i] : 0;
            const int64_t column = job.op.table[k].columns != NULL ? job.op.table[k].columns[j] : j;
            x += aptc_load(job.op.table[k].data, job.op.table[k].type, id * job.op.table[k].stride + column);
        }
        aptc_set(&job.x, i, j, x);
    }
}
APTC_LAUNCHER(aptc_embed_kernel, aptc_embed)

static bool aptc_embed_op(aptc_device *d, const apti_embed_job *op)
{
    for (int32_t k = 0; k < 3; k++)
        if (op->table[k].data != NULL && op->table[k].nr != 1) return false;
    aptc_embed job;
    memset(&job, 0, sizeof job);
    job.op = *op;
    job.x = aptc_out(d, op->x, op->ldx, op->rows, op->d);
    APTC_LAUNCH_ROWS(d, aptc_embed_kernel, job, op->rows, op->d);
    return true;
}

/* x(rows, n) and from(rows, n), one of which is meant by its rows' names */
typedef struct aptc_named { aptc_view x, from; const int32_t *index; int64_t rows, n; } aptc_named;

APTC_KERNEL(aptc_gather_kernel, aptc_named)
{
    APTC_EACH(job.rows, job.n) {
        const aptc_four x = aptc_get_four(&job.from, job.index[e.i], e.j, e.count);
        APTC_SET(job.x, x);
    }
}
APTC_LAUNCHER(aptc_gather_kernel, aptc_named)

static bool aptc_gather_op(aptc_device *d, const apti_rows_job *op)
{
    aptc_named job;
    memset(&job, 0, sizeof job);
    job.from = aptc_in_rows(d, op->from, op->ld_from, op->d);
    job.x = aptc_out(d, op->x, op->ldx, op->rows, op->d);
    job.index = op->index;
    job.rows = op->rows;
    job.n = op->d;
    APTC_LAUNCH_EACH(d, aptc_gather_kernel, job);
    return true;
}

/* The smaller matrix of a compaction: its rows and columns were others before. */
typedef struct aptc_cut { apti_cut_job op; int64_t rows, n; } aptc_cut;

APTC_DEVICE int64_t aptc_axis_source(const apt_axis *axis, int64_t i)
{
    const int64_t unit = i / axis->width;
    return (axis->index != NULL ? axis->index[unit] : unit) * axis->width + i % axis->width;
}

APTC_KERNEL(aptc_cut_kernel, aptc_cut)
{
    APTC_EACH_ONE(job.rows, job.n) {
        const int64_t to = i * job.n + j, row = aptc_axis_source(&job.op.rows, i);
        const int64_t from = row * job.op.ld_from + aptc_axis_source(&job.op.cols, j);
        if (job.op.type == APT_F32) ((float *)job.op.to)[to] = ((const float *)job.op.from)[from];
        else ((uint16_t *)job.op.to)[to] = ((const uint16_t *)job.op.from)[from];
    }
}
APTC_LAUNCHER(aptc_cut_kernel, aptc_cut)

static bool aptc_cut_op(aptc_device *d, const apti_cut_job *op)
{
    const aptc_cut job = {*op, (int64_t)op->rows.kept * op->rows.width, (int64_t)op->cols.kept * op->cols.width};
    if (!aptc_has(op->type)) return false;
    if (job.rows > 0 && job.n > 0) APTC_LAUNCH_EACH(d, aptc_cut_kernel, job);
    return true;
}

/* Row APTC_BY of x takes the rows of `from` that name it, in their order: no two blocks write to the same place. The list of
   names is read piece by piece; index NULL: all are for row 0. */
typedef struct aptc_scatter {
    aptc_view x, from;
    const int32_t *index;
    int64_t rows, zero_rows, targets, n;
} aptc_scatter;

APTC_KERNEL(aptc_scatter_kernel, aptc_scatter)
{
    APTC_SHARED(int32_t, name, APTC_BLOCK);
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(int32_t, hits);
    for (int64_t target = APTC_BY; target < job.targets; target += APTC_ROWS) {
        APTC_THREADS(t) {
            APTC_MINE(sum, t) = 0;
            APTC_MINE(hits, t) = 0;
        }
        for (int64_t first = 0; first < job.rows; first += APTC_BLOCK) {
            const int64_t count = aptc_min(APTC_BLOCK, job.rows - first);
            APTC_BARRIER;
            APTC_THREADS(t) if (t < count) name[t] = job.index != NULL ? job.index[first + t] : 0;
            APTC_BARRIER;
            APTC_THREADS(t) {
                const int64_t j = APTC_BX * APTC_BLOCK + t;
                for (int64_t i = 0; j < job.n && i < count; i++) {
                    if (name[i] != target) continue;
                    APTC_MINE(sum, t) += aptc_get(&job.from, first + i, j);
                    APTC_MINE(hits, t)++;
                }
            }
        }
        APTC_THREADS(t) {
            const int64_t j = APTC_BX * APTC_BLOCK + t;
            if (j < job.n && target < job.zero_rows) aptc_set(&job.x, target, j, APTC_MINE(sum, t));
            else if (j < job.n && APTC_MINE(hits, t) > 0)
                aptc_set(&job.x, target, j, aptc_get(&job.x, target, j) + APTC_MINE(sum, t));
        }
        APTC_BARRIER;
    }
}
APTC_LAUNCHER(aptc_scatter_kernel, aptc_scatter)

/* Names that differ: each row has a place of its own. */
APTC_KERNEL(aptc_place_kernel, aptc_named)
{
    APTC_EACH(job.rows, job.n) {
        const aptc_four from = APTC_GET(job.from);
        aptc_four x = aptc_get_four(&job.x, job.index[e.i], e.j, e.count);
        for (int32_t c = 0; c < APTC_FOUR; c++) x.x[c] += from.x[c];
        aptc_set_four(&job.x, job.index[e.i], e.j, e.count, &x);
    }
}
APTC_LAUNCHER(aptc_place_kernel, aptc_named)

static bool aptc_scatter_op(aptc_device *d, const apti_rows_job *op)
{
    const aptc_view from = aptc_in(d, op->from, op->ld_from, op->rows, op->d);
    const bool all = op->zero_rows > 0 && op->zero_rows >= op->targets;
    const aptc_view x = all ? aptc_out(d, op->x, op->ldx, op->zero_rows, op->d) : aptc_in_rows(d, op->x, op->ldx, op->d);
    if (op->unique) {
        const aptc_cast zero = {x, {NULL, 0, APT_F32}, op->zero_rows, op->d};
        const aptc_named place = {x, from, op->index, op->rows, op->d};
        if (op->zero_rows > 0) APTC_LAUNCH_EACH(d, aptc_cast_kernel, zero);
        if (op->rows > 0) APTC_LAUNCH_EACH(d, aptc_place_kernel, place);
        return true;
    }
    const aptc_scatter job = {x, from, op->index, op->rows, op->zero_rows, op->targets, op->d};
    APTC_LAUNCH(d, aptc_scatter_kernel, job, aptc_ceil(op->d, APTC_BLOCK), aptc_min(op->targets, APTC_GRID_ROWS));
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Losses: a block per row
   ------------------------------------------------------------------------------------------------------------------ */

/* m = the largest x(n); s = sum of exp(factor (x - m)); both of the whole block, through 2 * APTC_WARPS floats of it.
   An entry that is NaN or infinite makes s NaN. Ends with a barrier. */
#define APTC_ROW_MAX_SUM(x, n, factor, room, m, s)                                                                      \
    do {                                                                                                                \
        APTC_THREADS(t) {                                                                                               \
            APTC_MINE(m, t) = -INFINITY;                                                                                \
            for (int64_t j = t; j < (n); j += APTC_BLOCK) APTC_MINE(m, t) = fmaxf(APTC_MINE(m, t), (x)[j]);             \
        }                                                                                                               \
        APTC_WARP_MAX(m);                                                                                               \
        APTC_THREADS(t) if (t % APTC_WARP == 0) room[t / APTC_WARP] = APTC_MINE(m, t);                                  \
        APTC_BARRIER;                                                                                                   \
        APTC_THREADS(t) {                                                                                               \
            for (int32_t w = 0; w < APTC_WARPS; w++) APTC_MINE(m, t) = fmaxf(APTC_MINE(m, t), room[w]);                 \
            APTC_MINE(s, t) = 0;                                                                                        \
            for (int64_t j = t; j < (n); j += APTC_BLOCK)                                                               \
                APTC_MINE(s, t) += isfinite((x)[j]) ? expf((factor) * ((x)[j] - APTC_MINE(m, t))) : NAN;                \
        }                                                                                                               \
        APTC_WARP_SUM(s);                                                                                               \
        APTC_THREADS(t) if (t % APTC_WARP == 0) room[APTC_WARPS + t / APTC_WARP] = APTC_MINE(s, t);                     \
        APTC_BARRIER;                                                                                                   \
        APTC_THREADS(t) {                                                                                               \
            APTC_MINE(s, t) = 0;                                                                                        \
            for (int32_t w = 0; w < APTC_WARPS; w++) APTC_MINE(s, t) += room[APTC_WARPS + w];                           \
        }                                                                                                               \
    } while (0)

typedef struct aptc_cross_entropy {
    float *dlogits;
    const float *logits;
    const int32_t *labels;
    double *partial;                  /* (rows, 2): the row's term, 1 when its label is hit */
    int64_t ldd, ldl, rows, n;
    int32_t ignore;
    float weight;
} aptc_cross_entropy;

APTC_KERNEL(aptc_cross_entropy_kernel, aptc_cross_entropy)
{
    APTC_SHARED(float, room, 2 * APTC_WARPS);
    APTC_SHARED(int32_t, first, APTC_BLOCK);
    APTC_PRIVATE(float, m);
    APTC_PRIVATE(float, s);
    const int64_t row = APTC_BX;
    const float *x = job.logits + row * job.ldl;
    float *dx = job.dlogits != NULL ? job.dlogits + row * job.ldd : NULL;
    const int32_t label = job.labels[row];
    const bool counts = label != job.ignore && label >= 0 && label < job.n;
    const float own = counts ? x[label] : 0.0f;       /* read before dx, which may be x, is written */
    APTC_ROW_MAX_SUM(x, job.n, 1.0f, room, m, s);
    APTC_THREADS(t) {
        first[t] = INT32_MAX;
        for (int64_t j = t; j < job.n; j += APTC_BLOCK)
            if (first[t] == INT32_MAX && x[j] == APTC_MINE(m, t)) first[t] = (int32_t)j;
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const float scale = job.weight / APTC_MINE(s, t);
        for (int64_t j = t; dx != NULL && j < job.n; j += APTC_BLOCK)
            dx[j] = !counts ? 0.0f : expf(x[j] - APTC_MINE(m, t)) * scale - (j == label ? job.weight : 0.0f);
        int32_t best = INT32_MAX;
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) best = first[k] < best ? first[k] : best;
        if (t == 0) job.partial[2 * row] = counts ? (double)APTC_MINE(m, t) - (double)own + log((double)APTC_MINE(s, t)) : 0.0;
        if (t == 0) job.partial[2 * row + 1] = counts && isfinite(APTC_MINE(s, t)) && best == label ? 1.0 : 0.0;
    }
}
APTC_LAUNCHER(aptc_cross_entropy_kernel, aptc_cross_entropy)

static bool aptc_cross_entropy_op(aptc_device *d, const apti_loss_job *op)
{
    double *partial = (double *)aptc_take(d, op->rows * 2 * (int64_t)sizeof(double));
    if (partial == NULL) return false;
    const aptc_cross_entropy job = {op->dlogits, op->logits, op->labels, partial,    op->ldd,
                                    op->ldl,     op->rows,   op->classes, op->ignore, (float)op->weight[0]};
    const aptc_total total = {op->result, partial, op->rows, 2};
    APTC_LAUNCH(d, aptc_cross_entropy_kernel, job, op->rows, 1);
    APTC_LAUNCH(d, aptc_total_kernel, total, 1, 1);
    return true;
}

APTC_KERNEL(aptc_kl_kernel, apti_kl_job)
{
    APTC_SHARED(float, room, 2 * APTC_WARPS);
    APTC_SHARED(double, term, APTC_BLOCK);
    APTC_PRIVATE(float, ms);
    APTC_PRIVATE(float, ss);
    APTC_PRIVATE(float, mt);
    APTC_PRIVATE(float, st);
    const int64_t row = APTC_BX;
    const float *x = job.student + row * job.ld, *y = job.teacher + row * job.ld, cold = 1.0f / job.temperature;
    float *dx = job.grad + row * job.ld;
    APTC_ROW_MAX_SUM(x, job.vocab, cold, room, ms, ss);
    APTC_BARRIER;
    APTC_ROW_MAX_SUM(y, job.vocab, cold, room, mt, st);
    APTC_THREADS(t) {
        const float log_s = logf(APTC_MINE(ss, t)), log_t = logf(APTC_MINE(st, t));
        term[t] = 0;
        for (int64_t j = t; j < job.vocab; j += APTC_BLOCK) {
            const float a = cold * (x[j] - APTC_MINE(ms, t)) - log_s, b = cold * (y[j] - APTC_MINE(mt, t)) - log_t, q = expf(b);
            if (q > 0) term[t] += (double)q * ((double)b - (double)a);
            dx[j] = job.scale * job.temperature * (expf(a) - q);
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        double total = 0;
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += term[k];
        if (t == 0) job.row_loss[row] = total * (double)job.temperature * (double)job.temperature;
    }
}
APTC_LAUNCHER(aptc_kl_kernel, apti_kl_job)

typedef struct aptc_layer_loss { apti_layer_loss op; aptc_view h, dy; } aptc_layer_loss;

APTC_KERNEL(aptc_layer_loss_kernel, aptc_layer_loss)
{
    APTC_SHARED(double, term, APTC_BLOCK);
    APTC_SHARED(double, square, APTC_BLOCK);
    const int64_t row = APTC_BX;
    float *m = job.op.mapped + row * job.op.ld_mapped;
    const float *y = job.op.teacher + row * job.op.dt;
    APTC_THREADS(t) {
        for (int64_t i = t; i < job.op.d; i += APTC_BLOCK) m[job.op.place[i]] += aptc_get(&job.h, row, i);     /* all differ */
        square[t] = 0;
        for (int64_t i = t; i < job.op.dt; i += APTC_BLOCK) square[t] += (double)y[i] * (double)y[i];
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        double total = 0;
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += square[k];
        if (t == 0) square[0] = job.op.relative ? total > 0 ? (double)job.op.dt / total : 0.0 : 1.0;    /* u */
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const float scale = (float)((double)job.op.coefficient * square[0]);
        term[t] = 0;
        for (int64_t i = t; i < job.op.dt; i += APTC_BLOCK) {
            const float e = m[i] - y[i];
            term[t] += (double)e * (double)e;
            m[i] = e * scale;
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        double total = 0;
        for (int64_t i = t; i < job.op.d; i += APTC_BLOCK)
            aptc_set(&job.dy, row, i, aptc_get(&job.dy, row, i) + m[job.op.place[i]]);
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += term[k];
        if (t == 0) job.op.row_sum[row] = square[0] * total;
    }
}
APTC_LAUNCHER(aptc_layer_loss_kernel, aptc_layer_loss)

static void aptc_layer_loss_op(aptc_device *d, const apti_layer_loss *op)
{
    aptc_layer_loss job;
    memset(&job, 0, sizeof job);
    job.op = *op;
    job.h = aptc_in(d, op->h, op->ld, op->rows, op->d);
    job.dy = aptc_in(d, op->dy, op->ld, op->rows, op->d);
    APTC_LAUNCH(d, aptc_layer_loss_kernel, job, op->rows, 1);
}

/* ---------------------------------------------------------------------------------------------------------------------
   Tiles: products inside a block, of operands in its shared memory
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    APTC_TILE_MAX = 64,
    APTC_HEAD_MAX = 128,              /* wider heads are the CPU's */
    APTC_ROOM_BYTES = 240 * 1024      /* shared memory that an emulated block has; a device's: aptc_device.room */
};

/* c(m, n) = [c +] a b with m, n and k multiples of 16; a_t: a is (k, m) in memory, b_t: b is (n, k). All threads call it, and
   barriers stand around it. Operands are of `type`; of halves there are only products c = a b^T, 32-byte aligned, with strides
   that are multiples of 8, ldc of 4. */
typedef struct aptc_tile_product {
    float *c;
    const void *a, *b;
    int32_t ldc, lda, ldb, m, n, k;
    bool a_t, b_t, keep;
} aptc_tile_product;

#ifdef APT_CUDA_EMULATE
/* Not under the sanitizers, which would take most of the time: the device's indices are others, and the room is one array. */
__attribute__((no_sanitize("address", "undefined"))) static void aptc_tile_multiply(const aptc_tile_product *p, apt_dtype type)
{
    float a[APTC_TILE_MAX * APTC_HEAD_MAX], b[APTC_TILE_MAX * APTC_HEAD_MAX];
    for (int32_t i = 0; i < p->m; i++)
        for (int32_t x = 0; x < p->k; x++) a[i * p->k + x] = aptc_load(p->a, type, p->a_t ? x * p->lda + i : i * p->lda + x);
    for (int32_t x = 0; x < p->k; x++)
        for (int32_t j = 0; j < p->n; j++) b[x * p->n + j] = aptc_load(p->b, type, p->b_t ? j * p->ldb + x : x * p->ldb + j);
    for (int32_t i = 0; i < p->m; i++) {
        float *c = p->c + i * p->ldc;
        for (int32_t j = 0; j < p->n && !p->keep; j++) c[j] = 0;
        for (int32_t x = 0; x < p->k; x++)
            for (int32_t j = 0; j < p->n; j++) c[j] += a[i * p->k + x] * b[x * p->n + j];
    }
}
#else
/* A thread has 4 x 4 elements of c; its rows and columns lie m / 4 and n / 4 apart, so that a warp reads b without conflicts. */
template <apt_dtype type>
static __device__ void aptc_tile_plain(const aptc_tile_product *p)
{
    const int32_t mh = p->m / 4, nh = p->n / 4, ai = p->a_t ? 1 : p->lda, ax = p->a_t ? p->lda : 1;
    const int32_t bj = p->b_t ? p->ldb : 1, bx = p->b_t ? 1 : p->ldb;
    for (int32_t o = (int32_t)threadIdx.x; o < mh * nh; o += APTC_BLOCK) {
        const int32_t i = o / nh, j = o % nh;
        float sum[4][4];
        for (int32_t u = 0; u < 4; u++)
            for (int32_t v = 0; v < 4; v++) sum[u][v] = p->keep ? p->c[(i + u * mh) * p->ldc + j + v * nh] : 0.0f;
        for (int32_t x = 0; x < p->k; x++) {
            float left[4], right[4];
            for (int32_t u = 0; u < 4; u++) left[u] = aptc_load(p->a, type, (i + u * mh) * ai + x * ax);
            for (int32_t v = 0; v < 4; v++) right[v] = aptc_load(p->b, type, (j + v * nh) * bj + x * bx);
            for (int32_t u = 0; u < 4; u++)
                for (int32_t v = 0; v < 4; v++) sum[u][v] += left[u] * right[v];
        }
        for (int32_t u = 0; u < 4; u++)
            for (int32_t v = 0; v < 4; v++) p->c[(i + u * mh) * p->ldc + j + v * nh] = sum[u][v];
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
/* On tensor cores: a warp has 16 x 16 elements of c. */
template <class half_type>
static __device__ void aptc_tile_halves(const aptc_tile_product *p)
{
    namespace wmma = nvcuda::wmma;
    const half_type *a = (const half_type *)p->a, *b = (const half_type *)p->b;
    for (int32_t o = (int32_t)threadIdx.x / APTC_WARP; o < p->m / 16 * (p->n / 16); o += APTC_WARPS) {
        const int32_t i = o / (p->n / 16) * 16, j = o % (p->n / 16) * 16;
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
        wmma::fill_fragment(sum, 0.0f);
        for (int32_t x = 0; x < p->k; x += 16) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, half_type, wmma::row_major> left;
            wmma::fragment<wmma::matrix_b, 16, 16, 16, half_type, wmma::col_major> right;
            wmma::load_matrix_sync(left, a + i * p->lda + x, (unsigned)p->lda);
            wmma::load_matrix_sync(right, b + j * p->ldb + x, (unsigned)p->ldb);
            wmma::mma_sync(sum, left, right, sum);
        }
        wmma::store_matrix_sync(p->c + i * p->ldc + j, sum, (unsigned)p->ldc, wmma::mem_row_major);
    }
}
#endif

/* Code for devices before sm_80, which is what nvcc makes when it is told nothing, has no tensor cores for bfloat16. */
static __device__ void aptc_tile_multiply(const aptc_tile_product *p, apt_dtype type)
{
    if (type == APT_F32) aptc_tile_plain<APT_F32>(p);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    else if (type == APT_BF16) aptc_tile_halves<__nv_bfloat16>(p);
    else aptc_tile_halves<__half>(p);
#else
    else if (type == APT_BF16) aptc_tile_plain<APT_BF16>(p);
    else aptc_tile_plain<APT_F16>(p);
#endif
}
#endif

/* Products of a warp on tensor cores, whose operands and results are in its registers. With g = lane / 4 and c = lane % 4 a lane
   has
   a(16, 16)   in register 0 (g, 2c) and (g, 2c + 1), in 1 those of row g + 8, in 2 and 3 those 8 columns further
   b(16, 8)    in register 0 (2c, g) and (2c + 1, g), in 1 those 8 rows further
   d(16, 8)    (g, 2c), (g, 2c + 1), and those of row g + 8
   Two halves are a register, the first one in its lower bits.

   aptc_mma             d += a b, from register di, ai and bi on
   aptc_ldmatrix        registers r = 0 .. 3 from four matrices (8, 8) of halves in shared memory; lane 8 r + i says where row i
                        of matrix r begins: at x + at, on 16 bytes. A lane gets (g, 2c) and (g, 2c + 1); turned: (2c, g) and
                        (2c + 1, g)
   aptc_quad_reduce     x[i] = the sum or the largest over the lanes that have the same rows
   aptc_read16, aptc_write16    16 bytes, aligned
   aptc_copy_async      the same from global to shared memory, there after APTC_COPIES_WAIT(n), which waits for all groups but the
                        last n, and a barrier; APTC_COPIES_END ends a group */
#ifdef APT_CUDA_EMULATE
static void aptc_read16(uint32_t *to, const void *from) { memcpy(to, from, 16); }
static void aptc_write16(void *to, const uint32_t *from) { memcpy(to, from, 16); }

/* Copies are done when somebody waits for their group, so that a missing wait shows. */
enum { APTC_COPIES = 8192 };          /* more than blocks have under way */
typedef struct aptc_copies {
    int32_t count, group;             /* group: how many have ended */
    struct { void *to; const void *from; int32_t group; } copy[APTC_COPIES];
} aptc_copies;

static aptc_copies *aptc_copies_here(void)
{
    static __thread aptc_copies copies;
    return &copies;
}

static void aptc_copy_async(void *to, const void *from)
{
    aptc_copies *c = aptc_copies_here();
    if (c->count == APTC_COPIES) abort();
    c->copy[c->count].to = to;
    c->copy[c->count].from = from;
    c->copy[c->count++].group = c->group;
}

static void aptc_copies_wait(int32_t but)
{
    aptc_copies *c = aptc_copies_here();
    int32_t left = 0;
    for (int32_t i = 0; i < c->count; i++) {
        if (c->copy[i].group < c->group - but) memcpy(c->copy[i].to, c->copy[i].from, 16);
        else c->copy[left++] = c->copy[i];
    }
    c->count = left;
}
#define APTC_COPIES_END aptc_copies_here()->group++
#define APTC_COPIES_WAIT(n) aptc_copies_wait(n)

static void aptc_quad_reduce(float (*x)[APTC_REGISTERS], int32_t i, bool max)
{
    for (int32_t step = 2; step > 0; step /= 2) {
        float old[APTC_BLOCK];
        for (int32_t t = 0; t < APTC_BLOCK; t++) old[t] = x[t][i];
        for (int32_t t = 0; t < APTC_BLOCK; t++) x[t][i] = max ? fmaxf(old[t], old[t ^ step]) : old[t] + old[t ^ step];
    }
}

static void aptc_ldmatrix(int32_t warps, uint32_t (*to)[APTC_REGISTERS], const uint16_t *x, const int32_t *at, bool turned)
{
    for (int32_t t = 0; t < warps * APTC_WARP; t++)
        for (int32_t r = 0; r < 4; r++) {
            const int32_t g = t % APTC_WARP / 4, c = t % 4, first = t / APTC_WARP * APTC_WARP + 8 * r;
            uint16_t half[2];
            for (int32_t h = 0; h < 2; h++) {
                const int32_t row = turned ? 2 * c + h : g, column = turned ? g : 2 * c + h;
                memcpy(&half[h], x + at[first + row] + column, sizeof half[h]);
            }
            to[t][r] = (uint32_t)half[0] | (uint32_t)half[1] << 16;
        }
}

/* Not under the sanitizers, which would take most of the time. */
__attribute__((no_sanitize("address", "undefined")))
static void aptc_mma(apt_dtype type, int32_t warps, float (*d)[APTC_REGISTERS], int32_t di, uint32_t (*a)[APTC_REGISTERS],
                     int32_t ai, uint32_t (*b)[APTC_REGISTERS], int32_t bi)
{
    for (int32_t warp = 0; warp < warps; warp++) {
        float left[16][16], right[16][8], sum[16][8];
        for (int32_t lane = 0; lane < APTC_WARP; lane++) {
            const int32_t t = warp * APTC_WARP + lane, g = lane / 4, c = lane % 4;
            for (int32_t r = 0; r < 4; r++)
                for (int32_t h = 0; h < 2; h++) {
                    left[g + r % 2 * 8][2 * c + r / 2 * 8 + h] = aptc_from_half((uint16_t)(a[t][ai + r] >> 16 * h), type);
                    if (r < 2) right[2 * c + r * 8 + h][g] = aptc_from_half((uint16_t)(b[t][bi + r] >> 16 * h), type);
                    sum[g + r / 2 * 8][2 * c + r % 2] = d[t][di + r];
                }
        }
        for (int32_t i = 0; i < 16; i++)
            for (int32_t x = 0; x < 16; x++)
                for (int32_t j = 0; j < 8; j++) sum[i][j] += left[i][x] * right[x][j];
        for (int32_t lane = 0; lane < APTC_WARP; lane++)
            for (int32_t r = 0; r < 4; r++)
                d[warp * APTC_WARP + lane][di + r] = sum[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    }
}
#else
static __device__ __forceinline__ void aptc_read16(uint32_t *to, const void *from)
{
    const uint4 x = *(const uint4 *)from;
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
}

static __device__ __forceinline__ void aptc_write16(void *to, const uint32_t *from)
{
    *(uint4 *)to = make_uint4(from[0], from[1], from[2], from[3]);
}

static __device__ __forceinline__ void aptc_quad_reduce(float *x, int32_t i, bool max)
{
    for (int32_t step = 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x[i], step);
        x[i] = max ? fmaxf(x[i], other) : x[i] + other;
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
static __device__ __forceinline__ void aptc_copy_async(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

#define APTC_COPIES_END asm volatile("cp.async.commit_group;" ::: "memory")
#define APTC_COPIES_WAIT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")

static __device__ __forceinline__ void aptc_ldmatrix(int32_t, uint32_t *to, const uint16_t *x, int32_t at, bool turned)
{
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(x + at);
    if (turned)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

#define APTC_MMA(type)                                                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                         \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                      \
                 : "+f"(d[di]), "+f"(d[di + 1]), "+f"(d[di + 2]), "+f"(d[di + 3])                                       \
                 : "r"(a[ai]), "r"(a[ai + 1]), "r"(a[ai + 2]), "r"(a[ai + 3]), "r"(b[bi]), "r"(b[bi + 1]))

static __device__ __forceinline__ void aptc_mma(apt_dtype type, int32_t, float *d, int32_t di, const uint32_t *a, int32_t ai,
                                                const uint32_t *b, int32_t bi)
{
    if (type == APT_BF16) APTC_MMA("bf16");
    else APTC_MMA("f16");
}
#else
/* The same of shuffles, for code that no tensor core will run. */
static __device__ __forceinline__ void aptc_copy_async(void *to, const void *from)
{
    uint32_t x[4];
    aptc_read16(x, from);
    aptc_write16(to, x);
}

#define APTC_COPIES_END ((void)0)
#define APTC_COPIES_WAIT(n) ((void)0)

static __device__ __noinline__ void aptc_ldmatrix(int32_t, uint32_t *to, const uint16_t *x, int32_t at, bool turned)
{
    const int32_t g = (int32_t)threadIdx.x % APTC_WARP / 4, c = (int32_t)threadIdx.x % 4;
    for (int32_t r = 0; r < 4; r++) {
        const int32_t first = __shfl_sync(0xffffffffu, at, 8 * r + (turned ? 2 * c : g));
        const int32_t second = __shfl_sync(0xffffffffu, at, 8 * r + (turned ? 2 * c + 1 : g));
        to[r] = (uint32_t)x[first + (turned ? g : 2 * c)] | (uint32_t)x[second + (turned ? g : 2 * c + 1)] << 16;
    }
}

static __device__ __noinline__ void aptc_mma(apt_dtype type, int32_t, float *d, int32_t di, const uint32_t *a, int32_t ai,
                                             const uint32_t *b, int32_t bi)
{
    const int32_t g = (int32_t)threadIdx.x % APTC_WARP / 4, c = (int32_t)threadIdx.x % 4;
    for (int32_t x = 0; x < 4; x++)                       /* the lane of each quad that has columns of a, rows of b */
        for (int32_t r = 0; r < 4; r++)
            for (int32_t v = 0; v < 2; v++) {
                const uint32_t left = __shfl_sync(0xffffffffu, a[ai + r], 4 * g + x);
                const uint32_t right = __shfl_sync(0xffffffffu, b[bi + r / 2], 4 * (2 * c + v) + x);
                for (int32_t h = 0; h < 32; h += 16)
                    d[di + r % 2 * 2 + v] += aptc_from_half((uint16_t)(left >> h), type) *
                                             aptc_from_half((uint16_t)(right >> h), type);
            }
}
#endif
#endif

/* ---------------------------------------------------------------------------------------------------------------------
   Attention

   A block holds a tile of queries by a tile of keys and walks over the other side, as the CPU does, with a running maximum and
   sum; nothing is ever T x T. The backward has a kernel for dq, which walks over the keys, one for dk and dv, which walks over
   the queries of all heads of a group, and one for the gradient of the bias, summed by sequence and then over them. Products of
   tiles round their operands as all products do; the rest is float32. With bfloat16 and float16, forward, dq, dk and dv have
   kernels of their own, aptc_flash_*, which do the same in the registers of tensor cores' operands.
   ------------------------------------------------------------------------------------------------------------------ */

/* One sequence and head. */
typedef struct aptc_place { int64_t q_row, k_row, queries, keys, shift; int32_t head, group; } aptc_place;

APTC_DEVICE aptc_place aptc_place_of(const aptc_attention *a, int64_t sequence, int32_t head)
{
    aptc_place p;
    p.q_row = a->q_offsets[sequence];
    p.k_row = a->k_offsets[sequence];
    p.queries = a->q_offsets[sequence + 1] - p.q_row;
    p.keys = (a->k_ends != NULL ? a->k_ends[sequence] : a->k_offsets[sequence + 1]) - p.k_row;
    p.shift = a->causal ? p.keys - p.queries : 0;
    p.head = head;
    p.group = head / a->share;
    return p;
}

/* Keys [0, limit) are visible to query i; none to a query that is not there. */
APTC_DEVICE int64_t aptc_limit(const aptc_attention *a, const aptc_place *p, int64_t i)
{
    if (i >= p->queries) return 0;
    return a->causal ? aptc_max(0, aptc_min(p->keys, i + p->shift + 1)) : p->keys;
}

/* Keys that queries up to the end of the tile at q0 see */
APTC_DEVICE int64_t aptc_seen_keys(const aptc_attention *a, const aptc_place *p, int64_t q0)
{
    return aptc_limit(a, p, aptc_min(q0 + a->rows, p->queries) - 1);
}

/* Column of the bias table for key j and query i */
APTC_DEVICE int64_t aptc_distance(const aptc_attention *a, const aptc_place *p, int64_t i, int64_t j)
{
    const int64_t last = a->span - 1;
    return aptc_max(-last, aptc_min(last, j - i - p->shift)) + last;
}

/* The logit of query i and key j from their product */
APTC_DEVICE float aptc_logit(const aptc_attention *a, const aptc_place *p, int64_t i, int64_t j, float product)
{
    float s = a->scale * product;
    if (a->bias != NULL) s += a->bias[p->head * (2 * (int64_t)a->span - 1) + aptc_distance(a, p, i, j)];
    return s;
}

/* What a block has in its shared memory, as bytes from its beginning: operands (rows or tile, wide) of the products' type, sums
   (rows, wide) and squares (rows, tile) of float, and vectors (rows). Strides are longer than rows, against bank conflicts. */
typedef struct aptc_room {
    int32_t operand[4], sum[2], square[2], vector[2], end;
    int32_t ld_operand, ld_sum, ld_square;
} aptc_room;

APTC_BOTH aptc_room aptc_room_of(const aptc_attention *a, int32_t operands, int32_t sums, int32_t squares, int32_t vectors)
{
    aptc_room r;
    int32_t at = 0;
    r.ld_operand = a->type == APT_F32 ? a->wide + 1 : a->wide + 8;
    r.ld_sum = a->wide + 4;
    r.ld_square = a->tile + 4;
    for (int32_t i = 0; i < 4; i++) {
        r.operand[i] = at;
        if (i < operands) at += (a->tile > a->rows ? a->tile : a->rows) * r.ld_operand * (int32_t)aptc_size(a->type);
    }
    for (int32_t i = 0; i < 2; i++) {
        r.sum[i] = at;
        if (i < sums) at += a->rows * r.ld_sum * 4;
    }
    for (int32_t i = 0; i < 2; i++) {
        r.square[i] = at;
        if (i < squares) at += a->rows * r.ld_square * 4;
    }
    for (int32_t i = 0; i < 2; i++) {
        r.vector[i] = at;
        if (i < vectors) at += a->rows * 4;
    }
    r.end = at;
    return r;
}

#define APTC_FORWARD_ROOM(a) aptc_room_of(a, 2, 1, 1, 2)
#define APTC_SWEEP_ROOM(a) aptc_room_of(a, 4, 0, 2, 5)
#define APTC_DQ_ROOM(a) aptc_room_of(a, 4, 1, 2, 0)
#define APTC_DKV_ROOM(a) aptc_room_of(a, 4, 2, 2, 0)
#define APTC_DBIAS_ROOM(a) aptc_room_of(a, 4, 0, 2, 2)

/* Begins a kernel: its room, and where things are in it */
#define APTC_ROOM(layout)                                                                                               \
    APTC_DYNAMIC(float, room, APTC_ROOM_BYTES / 4);                                                                     \
    const aptc_room r = layout(&job)
#define APTC_FLOATS(at) ((float *)((char *)room + (at)))
#define APTC_OPERAND(at) ((void *)((char *)room + (at)))

/* Thread t's share of tile(height, a->wide) = factor * x(rows, a->dim) from (row, column) on, zeros around it. A warp has a
   row. */
APTC_DEVICE void aptc_tile_load(const aptc_attention *a, int32_t t, void *tile, int32_t ld_tile, int32_t height,
                                const aptc_view *x, int64_t row, int64_t column, int64_t rows, float factor)
{
    for (int32_t i = t / APTC_WARP; i < height; i += APTC_WARPS)
        for (int32_t j = t % APTC_WARP; j < a->wide; j += APTC_WARP)
            aptc_store(tile, a->type, i * ld_tile + j, i < rows && j < a->dim ? factor * aptc_get(x, row + i, column + j) : 0.0f);
}

/* The tiles at (q0, k0) of one head */
#define APTC_LOAD_QUERIES(to, x, p, factor)                                                                             \
    APTC_THREADS(t) aptc_tile_load(&job, t, APTC_OPERAND(to), r.ld_operand, job.rows, &(x), (p).q_row + q0,             \
                                   (int64_t)(p).head * job.dim, (p).queries - q0, factor)
#define APTC_LOAD_KEYS(to, x, p)                                                                                        \
    APTC_THREADS(t) aptc_tile_load(&job, t, APTC_OPERAND(to), r.ld_operand, job.tile, &(x), (p).k_row + k0,             \
                                   (int64_t)(p).group * job.dim, (p).keys - k0, 1.0f)
#define APTC_ZERO_SUM(at) \
    APTC_THREADS(t) for (int32_t e = t; e < job.rows * r.ld_sum; e += APTC_BLOCK) APTC_FLOATS(at)[e] = 0

/* Phases, of all threads: products of the tile at (q0, k0) -> exp of their logits less the largest so far, in their place; the
   rows' largest (vector 0), their sums (vector 1) and the outputs so far (sum 0) are brought to the new largest. A
   warp has a row, and nothing of it is another's, so no barriers are needed. */
APTC_DEVICE void aptc_softmax_tile(const aptc_attention *a, const aptc_place *p, int64_t q0, int64_t k0, float *room,
                                   const aptc_room *r)
{
    APTC_PRIVATE(float, top);
    APTC_PRIVATE(float, total);
    APTC_PRIVATE(float, shrink);
    float *max = APTC_FLOATS(r->vector[0]), *sum = APTC_FLOATS(r->vector[1]);
    for (int32_t i0 = 0; i0 < a->rows; i0 += APTC_WARPS) {
        APTC_THREADS(t) {
            const int32_t i = i0 + t / APTC_WARP;
            const int64_t limit = aptc_limit(a, p, q0 + i);
            APTC_MINE(top, t) = -INFINITY;
            for (int32_t c = t % APTC_WARP; c < a->tile; c += APTC_WARP) {
                float *x = APTC_FLOATS(r->square[0]) + i * r->ld_square + c;
                *x = k0 + c < limit ? aptc_logit(a, p, q0 + i, k0 + c, *x) : -INFINITY;
                APTC_MINE(top, t) = fmaxf(APTC_MINE(top, t), *x);
            }
        }
        APTC_WARP_MAX(top);
        APTC_THREADS(t) {
            const int32_t i = i0 + t / APTC_WARP;
            const float m = fmaxf(APTC_MINE(top, t), max[i]);
            APTC_MINE(shrink, t) = m > -INFINITY ? expf(max[i] - m) : 1.0f;
            APTC_MINE(top, t) = m;
            APTC_MINE(total, t) = 0;
            for (int32_t c = t % APTC_WARP; c < a->tile; c += APTC_WARP) {
                float *x = APTC_FLOATS(r->square[0]) + i * r->ld_square + c;
                *x = *x == -INFINITY ? 0.0f : expf(*x - m);                           /* a NaN stays one */
                APTC_MINE(total, t) += *x;
            }
        }
        APTC_WARP_SUM(total);
        APTC_THREADS(t) {
            const int32_t i = i0 + t / APTC_WARP;
            float *acc = APTC_FLOATS(r->sum[0]) + i * r->ld_sum;
            for (int32_t c = t % APTC_WARP; c < a->wide; c += APTC_WARP) acc[c] *= APTC_MINE(shrink, t);
            if (t % APTC_WARP == 0) {
                sum[i] = sum[i] * APTC_MINE(shrink, t) + APTC_MINE(total, t);
                max[i] = APTC_MINE(top, t);
            }
        }
    }
}

/* Sums over the rows of a block's tile of o or d_o: its threads have a column of a head each and, if there are more of them,
   every lanes-th row. So there are aptc_sum_rows(a) rows of heads * dim sums, which are added up afterwards. */
APTC_BOTH int32_t aptc_sum_lanes(const aptc_attention *a) { return APTC_BLOCK / a->dim; }

static int64_t aptc_sum_rows(const aptc_attention *a) { return a->sequences * a->blocks * aptc_sum_lanes(a); }

/* Thread t's share; the tile begins at (row, column) of x. */
APTC_DEVICE void aptc_attention_sums(const aptc_attention *a, int64_t bx, int64_t by, int32_t t, aptc_view x, int64_t row,
                                     int64_t column, int64_t rows)
{
    const int32_t lanes = aptc_sum_lanes(a), lane = t / a->dim, c = t % a->dim;
    if ((a->sizes == NULL && a->sums == NULL) || lane >= lanes) return;
    const int64_t at = (((by / a->heads * a->blocks + bx) * lanes + lane) * a->heads + by % a->heads) * a->dim + c;
    float size = 0, sum = 0;
    for (int64_t i = lane; i < rows; i += lanes) {
        const float value = aptc_get(&x, row + i, column + c);
        size += fabsf(value);
        sum += value;
    }
    if (a->sizes != NULL) a->sizes[at] = size;
    if (a->sums != NULL) a->sums[at] = sum;
}

/* Block: BX = tile of queries, BY = (sequence, head) */
APTC_KERNEL(aptc_attention_forward_kernel, aptc_attention)
{
    APTC_ROOM(APTC_FORWARD_ROOM);
    float *acc = APTC_FLOATS(r.sum[0]), *s = APTC_FLOATS(r.square[0]);
    float *max = APTC_FLOATS(r.vector[0]), *sum = APTC_FLOATS(r.vector[1]);
    const aptc_tile_product logits = {s,        APTC_OPERAND(r.operand[0]), APTC_OPERAND(r.operand[1]), r.ld_square,
                                      r.ld_operand, r.ld_operand, job.rows, job.tile, job.wide, false, true, false};
    const aptc_tile_product values = {acc,        APTC_OPERAND(r.square[0]), APTC_OPERAND(r.operand[1]), r.ld_sum,
                                      r.ld_square, r.ld_operand, job.rows, job.wide, job.tile, false, false, true};
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * job.rows, seen = aptc_seen_keys(&job, &p, q0);
    const int64_t rows = aptc_min(job.rows, p.queries - q0);
    const aptc_view out = {acc, r.ld_sum, APT_F32};
    if (rows <= 0) {
        APTC_THREADS(t) aptc_attention_sums(&job, APTC_BX, APTC_BY, t, out, 0, 0, 0);
        return;
    }
    APTC_LOAD_QUERIES(r.operand[0], job.q, p, 1.0f);
    APTC_ZERO_SUM(r.sum[0]);
    APTC_THREADS(t) if (t < job.rows) {
        max[t] = -INFINITY;
        sum[t] = 0;
    }
    for (int64_t k0 = 0; k0 < seen; k0 += job.tile) {
        APTC_BARRIER;
        APTC_LOAD_KEYS(r.operand[1], job.k, p);
        APTC_BARRIER;
        aptc_tile_multiply(&logits, job.type);
        APTC_BARRIER;
        aptc_softmax_tile(&job, &p, q0, k0, room, &r);
        APTC_LOAD_KEYS(r.operand[1], job.v, p);
        APTC_BARRIER;
        aptc_tile_multiply(&values, job.type);
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const float mask = job.mask != NULL ? job.mask[p.group] : 1.0f;
        for (int32_t i = t / APTC_WARP; i < rows; i += APTC_WARPS) {
            float *x = acc + i * r.ld_sum;
            for (int32_t c = t % APTC_WARP; c < job.dim; c += APTC_WARP) {
                x[c] = sum[i] != 0 ? x[c] * (mask / sum[i]) : 0.0f;
                aptc_set(&job.o, p.q_row + q0 + i, (int64_t)p.head * job.dim + c, x[c]);
            }
            if (job.lse_out != NULL && t % APTC_WARP == 0)
                job.lse_out[(p.q_row + q0 + i) * job.heads + p.head] = sum[i] != 0 ? max[i] + logf(sum[i]) : 0.0f;
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) aptc_attention_sums(&job, APTC_BX, APTC_BY, t, out, 0, 0, rows);
}
APTC_LAUNCHER(aptc_attention_forward_kernel, aptc_attention)

/* ---- Halves: a block has 128 rows of its own, 16 of each warp, queries (forward and dq) or keys (dk and dv), walks over tiles
   of the other side, and keeps everything between two products in registers. Rows of halves in shared memory are `wide` long, 32,
   64 or 128 with zeros behind a head's dim, and lie 8 further apart, so that eight times 16 bytes below each other are in
   different banks. The next tile is on its way while one is used, where there is room for two (stages). */
enum { APTC_FLASH_ROWS = 16 * APTC_WARPS, APTC_FLASH_PAD = 8, APTC_FLASH_STEP = 32 /* keys in registers at a time, dq */ };

/* What lies in shared memory: own rows of one or two matrices, and per stage a tile of two matrices, the bias, and what the
   backward knows of queries. The result takes the place of the first ones as float in the end. */
typedef struct aptc_flash { int32_t ld, tile, stages, own, other, floats, bytes; } aptc_flash;

APTC_BOTH aptc_flash aptc_flash_of(int32_t wide, bool backward)
{
    aptc_flash f;
    f.ld = wide + APTC_FLASH_PAD;
    f.tile = wide > 64 ? 32 : 64;
    f.stages = backward && wide > 64 ? 1 : 2;
    f.own = APTC_FLASH_ROWS * f.ld;                       /* elements of one matrix */
    f.other = f.tile * f.ld;
    f.floats = APTC_FLASH_ROWS + f.tile + (backward ? 2 * f.tile : 0);
    f.bytes = ((backward ? 2 : 1) * f.own + 2 * f.stages * f.other) * 2 + f.stages * f.floats * 4;
    return f;
}

/* Element e of a lane's registers, of a product of 16 rows: its row among the block's, and its column. Both are as far behind
   those of lane 0 for every e; loops over e compare with the column of lane 0, a constant, or all columns would stay in
   registers. */
APTC_BOTH int32_t aptc_flash_row(int32_t t, int32_t e) { return t / APTC_WARP * 16 + t % APTC_WARP / 4 + e / 2 % 2 * 8; }
APTC_BOTH int32_t aptc_flash_column(int32_t t, int32_t e) { return e / 4 * 8 + t % 4 * 2 + e % 2; }

/* Of a product with keys from k0 on: row h of thread t, a query from q0 on, sees the elements whose column in lane 0 is less. */
APTC_INLINE int32_t aptc_flash_limit(const aptc_attention *a, const aptc_place *p, int32_t t, int32_t h, int32_t q0, int32_t k0)
{
    const int32_t i = q0 + aptc_flash_row(t, 2 * h), keys = (int32_t)p->keys, seen = a->causal ? i + (int32_t)p->shift + 1 : keys;
    return i < (int32_t)p->queries ? (seen < keys ? seen : keys) - k0 - aptc_flash_column(t, 0) : 0;
}

/* Can 8 elements from column `column` on, and from every 8th further one, be read or written 16 bytes at a time? */
APTC_BOTH bool aptc_flash_aligned(const aptc_view *x, int64_t column)
{
    const int64_t size = aptc_size((apt_dtype)x->type);
    return (((uint64_t)(uintptr_t)x->data | (uint64_t)(x->ld * size) | (uint64_t)(column * size)) & 15) == 0;
}

/* 8 halves of shared memory = factor times 8 elements of x from element `at` on */
APTC_INLINE void aptc_flash_convert(apt_dtype type, uint16_t *to, const aptc_view *x, int64_t at, float factor)
{
    union { uint32_t bits[8]; float value[8]; } w;
    uint32_t pair[4];
    if (x->type == APT_F32) {
        aptc_read16(w.bits, (const float *)x->data + at);
        aptc_read16(w.bits + 4, (const float *)x->data + at + 4);
    } else {
        aptc_read16(pair, (const uint16_t *)x->data + at);
        APTC_UNROLL for (int32_t u = 0; u < 8; u++)
            w.value[u] = aptc_from_half((uint16_t)(pair[u / 2] >> 16 * (u % 2)), (apt_dtype)x->type);
    }
    APTC_UNROLL for (int32_t u = 0; u < 4; u++) pair[u] = aptc_pack(type, factor * w.value[2 * u], factor * w.value[2 * u + 1]);
    aptc_write16(to, pair);
}

/* Thread t's share of a tile of `height` rows = factor * x(rows, a->dim) from (row, column) on, zeros around it; to be waited
   for */
APTC_INLINE void aptc_flash_load(const aptc_attention *a, apt_dtype type, int32_t t, uint16_t *tile, int32_t wide, int32_t height,
                                 const aptc_view *x, int64_t row, int32_t column, int32_t rows, float factor)
{
    const uint32_t zeros[4] = {0, 0, 0, 0};
    const bool aligned = aptc_flash_aligned(x, column), same = x->type == (int64_t)type && factor == 1;
    const int32_t parts = wide / 8, j = t % parts * 8;            /* APTC_BLOCK is a multiple of parts */
    for (int32_t i = t / parts; i < height; i += APTC_BLOCK / parts) {
        const int32_t count = i < rows ? a->dim - j : 0;
        const int64_t at = (row + i) * x->ld + column + j;
        uint16_t *to = tile + i * (wide + APTC_FLASH_PAD) + j;
        if (count < 8) aptc_write16(to, zeros);
        if (count >= 8 && aligned && same) aptc_copy_async(to, (const uint16_t *)x->data + at);
        else if (count >= 8 && aligned) aptc_flash_convert(type, to, x, at, factor);
        else APTC_NO_UNROLL for (int32_t u = 0; u < 8 && u < count; u++)
            aptc_store(to, type, u, factor * aptc_load(x->data, (apt_dtype)x->type, at + u));
    }
}

#define APTC_FLASH_LOAD_QUERIES(to, x, q0, height, factor)                                                              \
    APTC_THREADS(t) aptc_flash_load(a, type, t, to, wide, height, &(x), p.q_row + (q0), p.head * a->dim,                \
                                    (int32_t)p.queries - (q0), factor)
#define APTC_FLASH_LOAD_KEYS(to, x, k0, height)                                                                         \
    APTC_THREADS(t) aptc_flash_load(a, type, t, to, wide, height, &(x), p.k_row + (k0), p.group * a->dim,               \
                                    (int32_t)p.keys - (k0), 1.0f)
/* In the turns of a block of queries: what the turn after this one reads of the keys from `next` on, if there are some */
#define APTC_FLASH_LOAD_NEXT(turn, next)                                                                                \
    do {                                                                                                                \
        const int32_t coming = ((turn) + f.stages - 1) & (f.stages - 1);                                                \
        uint16_t *to = others + coming * 2 * f.other;                                                                   \
        if ((next) < seen) {                                                                                            \
            APTC_FLASH_LOAD_KEYS(to, a->k, next, f.tile);                                                               \
            APTC_FLASH_LOAD_KEYS(to + f.other, a->v, next, f.tile);                                                     \
            APTC_THREADS(t) aptc_flash_bias(a, &p, t, diagonals + coming * f.floats, q0, next, f.tile, false);          \
        }                                                                                                               \
        APTC_COPIES_END;                                                                                                \
    } while (0)
#define APTC_FLASH_WAIT(f)                               /* for all tiles but the one of the next turn */               \
    do {                                                                                                                \
        if ((f).stages > 1) APTC_COPIES_WAIT(1);                                                                        \
        else APTC_COPIES_WAIT(0);                                                                                       \
        APTC_BARRIER;                                                                                                   \
    } while (0)

/* Thread t's share of x(rows, a->dim) from (row, column) on = the floats of shared memory, in rows of wide + 4 */
APTC_INLINE void aptc_flash_store(const aptc_attention *a, int32_t t, const float *from, int32_t wide, const aptc_view *x,
                                  int64_t row, int32_t column, int32_t rows)
{
    const apt_dtype type = (apt_dtype)x->type;
    const bool aligned = aptc_flash_aligned(x, column);
    const int32_t parts = wide / 8, j = t % parts * 8;
    for (int32_t i = t / parts; i < rows; i += APTC_BLOCK / parts) {
        const int64_t at = (row + i) * x->ld + column + j;
        const float *f = from + i * (wide + 4) + j;
        uint32_t w[4];
        if (!aligned || j + 8 > a->dim) {
            for (int32_t u = 0; u < 8 && j + u < a->dim; u++) aptc_store(x->data, type, at + u, f[u]);
        } else if (type == APT_F32) {
            APTC_UNROLL for (int32_t u = 0; u < 8; u += 4) {
                aptc_read16(w, f + u);
                aptc_write16((float *)x->data + at + u, w);
            }
        } else {
            APTC_UNROLL for (int32_t u = 0; u < 4; u++) w[u] = aptc_pack(type, f[2 * u], f[2 * u + 1]);
            aptc_write16((uint16_t *)x->data + at, w);
        }
    }
}

/* Thread t's share of a sum lies down as float, in rows of wide + 4. */
APTC_INLINE void aptc_flash_lay(int32_t t, float *to, int32_t wide, const float *sum, float factor)
{
    APTC_UNROLL for (int32_t e = 0; e < wide / 2; e++)
        to[aptc_flash_row(t, e) * (wide + 4) + aptc_flash_column(t, e)] = factor * sum[e];
}

/* x(rows, a->dim) from (row, column) on = factor * sum, by way of the shared memory, which nobody needs any more */
APTC_INLINE void aptc_flash_end(const aptc_attention *a, int32_t wide, float *room, APTC_FRAGMENTS(float, sum), float factor,
                                const aptc_view *x, int64_t row, int32_t column, int32_t rows)
{
    APTC_BARRIER;
    APTC_THREADS(t) aptc_flash_lay(t, room, wide, APTC_MINE(sum, t), factor);
    APTC_BARRIER;
    APTC_THREADS(t) aptc_flash_store(a, t, room, wide, x, row, column, rows);
}

/* The warps' 16 rows of s = own other^T; other has `count` rows. */
APTC_INLINE void aptc_flash_dots(apt_dtype type, int32_t warps, APTC_FRAGMENTS(float, s), const uint16_t *own,
                                 const uint16_t *other, int32_t wide, int32_t count)
{
    const int32_t ld = wide + APTC_FLASH_PAD;
    APTC_FRAGMENT(uint32_t, left);
    APTC_FRAGMENT(uint32_t, right);
    APTC_PRIVATE(int32_t, down);                 /* matrices 0 and 1 are rows 0 to 15 */
    APTC_PRIVATE(int32_t, across);               /* matrices 0 and 1 are columns 0 to 15 */
    APTC_THREADS(t) {
        const int32_t lane = t % APTC_WARP;
        APTC_MINE(down, t) = (t / APTC_WARP * 16 + lane % 16) * ld + lane / 16 * 8;
        APTC_MINE(across, t) = (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8;
        APTC_UNROLL for (int32_t e = 0; e < count / 2; e++) APTC_MINE(s, t)[e] = 0;
    }
    APTC_WARPS_BELOW(warps);
    APTC_UNROLL for (int32_t x = 0; x < wide; x += 16) {
        aptc_ldmatrix(warps, left, own + x, down, false);
        APTC_UNROLL for (int32_t j = 0; j < count; j += 16) {
            aptc_ldmatrix(warps, right, other + j * ld + x, across, false);
            aptc_mma(type, warps, s, j / 2, left, 0, right, 0);
            aptc_mma(type, warps, s, j / 2 + 4, left, 0, right, 2);
        }
    }
}

/* The warps' 16 rows of sum += s other; other has `count` rows. The registers of a product, in pairs, are a left operand's. */
APTC_INLINE void aptc_flash_add(apt_dtype type, int32_t warps, APTC_FRAGMENTS(float, sum), APTC_FRAGMENTS(uint32_t, s),
                                const uint16_t *other, int32_t wide, int32_t count)
{
    const int32_t ld = wide + APTC_FLASH_PAD;
    APTC_FRAGMENT(uint32_t, right);
    APTC_PRIVATE(int32_t, down);
    APTC_THREADS(t) APTC_MINE(down, t) = t % 16 * ld + t % APTC_WARP / 16 * 8;
    APTC_WARPS_BELOW(warps);
    APTC_UNROLL for (int32_t j = 0; j < count; j += 16)
        APTC_UNROLL for (int32_t x = 0; x < wide; x += 16) {
            aptc_ldmatrix(warps, right, other + j * ld + x, down, true);
            aptc_mma(type, warps, sum, x / 2, s, j / 4, right, 0);
            aptc_mma(type, warps, sum, x / 2 + 4, s, j / 4, right, 2);
        }
}

/* Thread t's share of the bias of the block's rows and `count` others, which hangs on key - query only: where own row i and
   other j meet, element j - i + APTC_FLASH_ROWS - 1, or, own rows being keys (turned), i - j + count - 1 */
APTC_INLINE void aptc_flash_bias(const aptc_attention *a, const aptc_place *p, int32_t t, float *diagonal, int32_t q0, int32_t k0,
                                 int32_t count, bool turned)
{
    const int32_t last = a->span - 1, distance = k0 - q0 - (int32_t)p->shift + t - (turned ? count : APTC_FLASH_ROWS) + 1;
    if (a->bias != NULL && t < APTC_FLASH_ROWS + count)
        diagonal[t] = a->bias[p->head * (2 * (int64_t)last + 1) + aptc_max(-last, aptc_min(last, distance)) + last];
}

/* Thread t's share of products with `count` others -> logits; diagonal is where own row 0 and other 0 meet */
APTC_INLINE void aptc_flash_logits(const aptc_attention *a, int32_t t, float *s, const float *diagonal, int32_t count,
                                   bool turned)
{
    const int32_t sign = turned ? -1 : 1;
    const float *mine = diagonal + sign * (aptc_flash_column(t, 0) - aptc_flash_row(t, 0));
    APTC_UNROLL for (int32_t e = 0; e < count / 2; e++) s[e] *= a->scale;
    if (a->bias == NULL) return;
    APTC_UNROLL for (int32_t e = 0; e < count / 2; e++) s[e] += mine[sign * (aptc_flash_column(0, e) - aptc_flash_row(0, e))];
}

/* Products s with the `tile` keys from k0 on -> exp of the logits less the largest so far, in pairs; the sums of a thread's share
   of them and the outputs so far are brought to the new largest. */
APTC_INLINE void aptc_flash_softmax(const aptc_attention *a, const aptc_place *p, apt_dtype type, int32_t q0, int32_t k0,
                                    int32_t tile, int32_t wide, const float *diagonal, APTC_FRAGMENTS(float, s),
                                    APTC_FRAGMENTS(uint32_t, prob), APTC_FRAGMENTS(float, top), APTC_FRAGMENTS(float, sum),
                                    APTC_FRAGMENTS(float, out))
{
    APTC_FRAGMENT(float, max);
    APTC_THREADS(t) {
        int32_t seen[2];
        APTC_UNROLL for (int32_t h = 0; h < 2; h++) {
            seen[h] = aptc_flash_limit(a, p, t, h, q0, k0);
            APTC_MINE(max, t)[h] = APTC_MINE(top, t)[h];
        }
        aptc_flash_logits(a, t, APTC_MINE(s, t), diagonal + APTC_FLASH_ROWS - 1, tile, false);
        APTC_UNROLL for (int32_t e = 0; e < tile / 2; e++) {
            if (aptc_flash_column(0, e) >= seen[e / 2 % 2]) APTC_MINE(s, t)[e] = -INFINITY;
            APTC_MINE(max, t)[e / 2 % 2] = fmaxf(APTC_MINE(max, t)[e / 2 % 2], APTC_MINE(s, t)[e]);
        }
    }
    for (int32_t h = 0; h < 2; h++) aptc_quad_reduce(max, h, true);
    APTC_THREADS(t) {
        float base[2], shrink[2];
        APTC_UNROLL for (int32_t h = 0; h < 2; h++) {
            base[h] = APTC_MINE(max, t)[h] > -INFINITY ? APTC_MINE(max, t)[h] : 0.0f;       /* no key yet: all exps are 0 */
            shrink[h] = expf(APTC_MINE(top, t)[h] - base[h]);
            APTC_MINE(top, t)[h] = APTC_MINE(max, t)[h];
            APTC_MINE(sum, t)[h] *= shrink[h];
        }
        APTC_UNROLL for (int32_t e = 0; e < tile / 2; e++) {
            APTC_MINE(s, t)[e] = expf(APTC_MINE(s, t)[e] - base[e / 2 % 2]);
            APTC_MINE(sum, t)[e / 2 % 2] += APTC_MINE(s, t)[e];
        }
        APTC_UNROLL for (int32_t e = 0; e < tile / 4; e++)
            APTC_MINE(prob, t)[e] = aptc_pack(type, APTC_MINE(s, t)[2 * e], APTC_MINE(s, t)[2 * e + 1]);
        APTC_UNROLL for (int32_t e = 0; e < wide / 2; e++) APTC_MINE(out, t)[e] *= shrink[e / 2 % 2];
    }
}

/* Block: BX = tile of queries, BY = (sequence, head) */
APTC_INLINE void aptc_flash_forward(const aptc_attention *a, int32_t wide, apt_dtype type, int64_t bx, int64_t by)
{
    APTC_DYNAMIC(float, room, APTC_ROOM_BYTES / 4);
    APTC_FRAGMENT(float, s);
    APTC_FRAGMENT(float, top);
    APTC_FRAGMENT(float, sum);
    APTC_FRAGMENT(float, out);
    APTC_FRAGMENT(uint32_t, prob);
    const aptc_flash f = aptc_flash_of(wide, false);
    const aptc_place p = aptc_place_of(a, by / a->heads, (int32_t)(by % a->heads));
    const int32_t q0 = (int32_t)bx * APTC_FLASH_ROWS, seen = (int32_t)aptc_seen_keys(a, &p, q0);
    const int32_t rows = (int32_t)aptc_max(0, aptc_min(APTC_FLASH_ROWS, p.queries - q0)), warps = (rows + 15) / 16;
    const aptc_view result = {room, wide + 4, APT_F32};
    uint16_t *q = (uint16_t *)room, *others = q + f.own;
    float *diagonals = (float *)(others + 2 * f.stages * f.other);
    if (rows == 0) {
        APTC_THREADS(t) aptc_attention_sums(a, bx, by, t, result, 0, 0, 0);
        return;
    }
    APTC_FLASH_LOAD_QUERIES(q, a->q, q0, 16 * warps, 1.0f);
    APTC_THREADS(t) {
        APTC_MINE(top, t)[0] = APTC_MINE(top, t)[1] = -INFINITY;
        APTC_MINE(sum, t)[0] = APTC_MINE(sum, t)[1] = 0;
        APTC_UNROLL for (int32_t e = 0; e < wide / 2; e++) APTC_MINE(out, t)[e] = 0;
    }
    for (int32_t turn = 1 - f.stages; turn * f.tile < seen; turn++) {
        const int32_t k0 = turn * f.tile, next = k0 + (f.stages - 1) * f.tile, here = turn & (f.stages - 1);
        const uint16_t *k = others + here * 2 * f.other, *v = k + f.other;
        APTC_FLASH_LOAD_NEXT(turn, next);
        if (turn < 0) continue;
        APTC_FLASH_WAIT(f);
        aptc_flash_dots(type, warps, s, q, k, wide, f.tile);
        aptc_flash_softmax(a, &p, type, q0, k0, f.tile, wide, diagonals + here * f.floats, s, prob, top, sum, out);
        aptc_flash_add(type, warps, out, prob, v, wide, f.tile);
        APTC_BARRIER;
    }
    APTC_COPIES_WAIT(0);
    for (int32_t h = 0; h < 2; h++) aptc_quad_reduce(sum, h, false);
    APTC_THREADS(t) {
        const float mask = a->mask != NULL ? a->mask[p.group] : 1.0f;
        APTC_UNROLL for (int32_t e = 0; e < wide / 2; e++) {
            const float total = APTC_MINE(sum, t)[e / 2 % 2];
            APTC_MINE(out, t)[e] = total != 0 ? APTC_MINE(out, t)[e] * (mask / total) : 0.0f;
        }
        APTC_UNROLL for (int32_t h = 0; h < 2; h++) {
            const int32_t i = aptc_flash_row(t, 2 * h);
            const float total = APTC_MINE(sum, t)[h];
            if (a->lse_out != NULL && t % 4 == 0 && i < rows)
                a->lse_out[(p.q_row + q0 + i) * a->heads + p.head] = total != 0 ? APTC_MINE(top, t)[h] + logf(total) : 0.0f;
        }
    }
    aptc_flash_end(a, wide, room, out, 1.0f, &a->o, p.q_row + q0, p.head * a->dim, rows);
    APTC_THREADS(t) aptc_attention_sums(a, bx, by, t, result, 0, 0, rows);
}

/* A kernel for each width and both types. 128 registers are enough up to a width of 64; sequences are often short, and two blocks
   hide from each other what each begins and ends with. */
#define APTC_FLASH_KERNEL(name, wide)                                                                                   \
    APTC_KERNEL_SHARING(name##_##wide, aptc_attention, (wide) > 64 ? 1 : 2)                                             \
    {                                                                                                                   \
        if (job.type == APT_BF16) name(&job, wide, APT_BF16, APTC_BX, APTC_BY);                                         \
        else name(&job, wide, APT_F16, APTC_BX, APTC_BY);                                                               \
    }                                                                                                                   \
    APTC_LAUNCHER(name##_##wide, aptc_attention)
#define APTC_FLASH_KERNELS(name)                                                                                        \
    APTC_FLASH_KERNEL(name, 32)                                                                                         \
    APTC_FLASH_KERNEL(name, 64)                                                                                         \
    APTC_FLASH_KERNEL(name, 128)
#define APTC_LAUNCH_FLASH(d, name, job, bx, by, bytes)                                                                  \
    do {                                                                                                                \
        if ((job).wide == 32) APTC_LAUNCH_DYNAMIC(d, name##_32, job, bx, by, bytes);                                    \
        else if ((job).wide == 64) APTC_LAUNCH_DYNAMIC(d, name##_64, job, bx, by, bytes);                               \
        else APTC_LAUNCH_DYNAMIC(d, name##_128, job, bx, by, bytes);                                                    \
    } while (0)

APTC_FLASH_KERNELS(aptc_flash_forward)

/* dot(rows, heads) = d_o . o of each query and head: a warp each */
APTC_KERNEL(aptc_attention_dot_kernel, aptc_attention)
{
    APTC_PRIVATE(float, sum);
    APTC_THREADS(t) {
        const int64_t pair = APTC_BX * APTC_WARPS + t / APTC_WARP, row = pair / job.heads, column = pair % job.heads * job.dim;
        APTC_MINE(sum, t) = 0;
        for (int32_t c = t % APTC_WARP; pair < job.pairs && c < job.dim; c += APTC_WARP)
            APTC_MINE(sum, t) += aptc_get(&job.d_o, row, column + c) * aptc_get(&job.o, row, column + c);
    }
    APTC_WARP_SUM(sum);
    APTC_THREADS(t) {
        const int64_t pair = APTC_BX * APTC_WARPS + t / APTC_WARP;
        if (pair < job.pairs && t % APTC_WARP == 0) job.dot_out[pair] = APTC_MINE(sum, t);
    }
}
APTC_LAUNCHER(aptc_attention_dot_kernel, aptc_attention)

/* Thread t's share of P and dS = P (dP - dot - rest) of the tile at (q0, k0) from Q K^T and dP = dO V^T, which lie in their
   places. Where a query does not see a key both are 0. dS is the gradient of the logits. sweep: dP stays where it is seen. */
APTC_DEVICE void aptc_gradient_rows(const aptc_attention *a, const aptc_place *p, int32_t t, int64_t q0, int64_t k0, float *room,
                                    const aptc_room *r, bool sweep)
{
    for (int32_t i = t / APTC_WARP; i < a->tile; i += APTC_WARPS) {
        const int64_t limit = aptc_limit(a, p, q0 + i), at = (p->q_row + q0 + i) * a->heads + p->head;
        const float lse = limit > 0 ? a->lse[at] : 0.0f, rest = limit > 0 && a->rest != NULL ? a->rest[at] : 0.0f;
        const float mean = limit > 0 && !sweep ? a->dot[at] : 0.0f;
        for (int32_t c = t % APTC_WARP; c < a->tile; c += APTC_WARP) {
            const int32_t place = i * r->ld_square + c;
            float *prob = APTC_FLOATS(r->square[0]) + place, *ds = APTC_FLOATS(r->square[1]) + place;
            const bool sees = k0 + c < limit;
            *prob = sees ? expf(aptc_logit(a, p, q0 + i, k0 + c, *prob) - lse) : 0.0f;
            if (!sees) *ds = 0;
            else if (!sweep) *ds = *prob * (*ds - mean - rest);
        }
    }
}

/* The tiles of queries: operands 0, q, and 3, d_o times the head mask; of keys: 1, k, and 2, v */
#define APTC_LOAD_GIVEN(p)                                                                                              \
    APTC_LOAD_QUERIES(r.operand[0], job.q, p, 1.0f);                                                           \
    APTC_LOAD_QUERIES(r.operand[3], job.d_o, p, job.mask != NULL ? job.mask[(p).group] : 1.0f)
#define APTC_LOAD_SEEN(p)                                                                                               \
    APTC_LOAD_KEYS(r.operand[1], job.k, p);                                                                    \
    APTC_LOAD_KEYS(r.operand[2], job.v, p)

/* x(tile, tile) = left right^T of two operands */
#define APTC_TILE_DOTS(x, left, right)                                                                                  \
    {APTC_FLOATS(x),  APTC_OPERAND(left), APTC_OPERAND(right), r.ld_square, r.ld_operand, r.ld_operand,                 \
     job.tile,        job.tile,           job.wide,            false,       true,         false}

/* Between barriers, when all four operands are there */
#define APTC_GRADIENT_PRODUCTS                                                                                          \
    do {                                                                                                                \
        const aptc_tile_product logits = APTC_TILE_DOTS(r.square[0], r.operand[0], r.operand[1]);                       \
        const aptc_tile_product slopes = APTC_TILE_DOTS(r.square[1], r.operand[3], r.operand[2]);                       \
        aptc_tile_multiply(&logits, job.type);                                                                          \
        aptc_tile_multiply(&slopes, job.type);                                                                          \
        APTC_BARRIER;                                                                                                   \
    } while (0)
#define APTC_GRADIENT_TILE(p)                                                                                           \
    do {                                                                                                                \
        APTC_GRADIENT_PRODUCTS;                                                                                         \
        APTC_THREADS(t) aptc_gradient_rows(&job, &(p), t, q0, k0, room, &r, false);                                     \
    } while (0)

/* dot by a sweep over the keys, dot_i = sum over j of P(i, j) dP(i, j) / sum over j of P(i, j). With it the rows of dS sum to 0
   up to the rounding of dS; d_o . o leaves the rounding of its own terms, which hides small gradients where values are nearly
   alike. For their sake what is added up, in double, is how far dP is from that of the first key, and what of the result does not
   fit one float is the rest.
   Block: BX = tile of queries, BY = (sequence, head) */
APTC_KERNEL(aptc_attention_sweep_kernel, aptc_attention)
{
    APTC_ROOM(APTC_SWEEP_ROOM);
    APTC_PRIVATE(double, part_dot);
    APTC_PRIVATE(double, part_sum);
    double *dot = (double *)APTC_OPERAND(r.vector[0]), *sum = dot + job.rows;
    float *begin = (float *)(sum + job.rows);
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * job.tile, seen = aptc_seen_keys(&job, &p, q0);
    if (q0 >= p.queries) return;
    APTC_LOAD_GIVEN(p);
    APTC_THREADS(t) if (t < job.tile) {
        dot[t] = sum[t] = 0;
        begin[t] = 0;
    }
    for (int64_t k0 = 0; k0 < seen; k0 += job.tile) {
        APTC_BARRIER;
        APTC_LOAD_SEEN(p);
        APTC_BARRIER;
        APTC_GRADIENT_PRODUCTS;
        APTC_THREADS(t) aptc_gradient_rows(&job, &p, t, q0, k0, room, &r, true);
        APTC_BARRIER;
        APTC_THREADS(t) if (k0 == 0 && t < job.tile) begin[t] = APTC_FLOATS(r.square[1])[t * r.ld_square];
        APTC_BARRIER;
        for (int32_t i0 = 0; i0 < job.tile; i0 += APTC_WARPS) {
            APTC_THREADS(t) {
                const int32_t i = i0 + t / APTC_WARP;
                APTC_MINE(part_dot, t) = APTC_MINE(part_sum, t) = 0;
                for (int32_t c = t % APTC_WARP; c < job.tile; c += APTC_WARP) {
                    const double prob = (double)APTC_FLOATS(r.square[0])[i * r.ld_square + c];
                    const double further = (double)APTC_FLOATS(r.square[1])[i * r.ld_square + c] - (double)begin[i];
                    APTC_MINE(part_sum, t) += prob;
                    APTC_MINE(part_dot, t) += prob * further;
                }
            }
            APTC_WARP_SUM_DOUBLE(part_dot);
            APTC_WARP_SUM_DOUBLE(part_sum);
            APTC_THREADS(t) if (t % APTC_WARP == 0) {
                dot[i0 + t / APTC_WARP] += APTC_MINE(part_dot, t);
                sum[i0 + t / APTC_WARP] += APTC_MINE(part_sum, t);
            }
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) if (t < job.tile && q0 + t < p.queries) {
        const int64_t at = (p.q_row + q0 + t) * job.heads + p.head;
        const double all = (double)begin[t] + (sum[t] > 0 ? dot[t] / sum[t] : dot[t]);
        job.dot_out[at] = (float)all;
        job.rest_out[at] = (float)(all - (double)job.dot_out[at]);
    }
}
APTC_LAUNCHER(aptc_attention_sweep_kernel, aptc_attention)

/* Block: BX = tile of queries, BY = (sequence, head) */
APTC_KERNEL(aptc_attention_dq_kernel, aptc_attention)
{
    APTC_ROOM(APTC_DQ_ROOM);
    float *acc = APTC_FLOATS(r.sum[0]);
    const aptc_tile_product dq = {acc,       APTC_OPERAND(r.square[1]), APTC_OPERAND(r.operand[1]), r.ld_sum,
                                  r.ld_square, r.ld_operand, job.tile, job.wide, job.tile, false, false, true};
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * job.tile, seen = aptc_seen_keys(&job, &p, q0);
    const int64_t rows = aptc_max(0, aptc_min(job.tile, p.queries - q0));
    APTC_THREADS(t)
        aptc_attention_sums(&job, APTC_BX, APTC_BY, t, job.d_o, p.q_row + q0, (int64_t)p.head * job.dim, rows);
    if (rows == 0) return;
    APTC_LOAD_GIVEN(p);
    APTC_ZERO_SUM(r.sum[0]);
    for (int64_t k0 = 0; k0 < seen; k0 += job.tile) {
        APTC_BARRIER;
        APTC_LOAD_SEEN(p);
        APTC_BARRIER;
        APTC_GRADIENT_TILE(p);
        APTC_BARRIER;
        aptc_tile_multiply(&dq, job.type);
    }
    APTC_BARRIER;
    APTC_THREADS(t) for (int32_t i = t / APTC_WARP; i < rows; i += APTC_WARPS)
        for (int32_t c = t % APTC_WARP; c < job.dim; c += APTC_WARP)
            aptc_set(&job.dq, p.q_row + q0 + i, (int64_t)p.head * job.dim + c, job.scale * acc[i * r.ld_sum + c]);
}
APTC_LAUNCHER(aptc_attention_dq_kernel, aptc_attention)

/* Block: BX = tile of keys, BY = (sequence, key head) */
APTC_KERNEL(aptc_attention_dkv_kernel, aptc_attention)
{
    APTC_ROOM(APTC_DKV_ROOM);
    float *acc_k = APTC_FLOATS(r.sum[0]), *acc_v = APTC_FLOATS(r.sum[1]);
    const aptc_tile_product dk = {acc_k,     APTC_OPERAND(r.square[1]), APTC_OPERAND(r.operand[0]), r.ld_sum,
                                  r.ld_square, r.ld_operand, job.tile, job.wide, job.tile, true, false, true};
    const aptc_tile_product dv = {acc_v,     APTC_OPERAND(r.square[0]), APTC_OPERAND(r.operand[3]), r.ld_sum,
                                  r.ld_square, r.ld_operand, job.tile, job.wide, job.tile, true, false, true};
    const int32_t groups = job.heads / job.share, group = (int32_t)(APTC_BY % groups);
    aptc_place p = aptc_place_of(&job, APTC_BY / groups, group * job.share);
    const int64_t k0 = APTC_BX * job.tile;
    if (k0 >= p.keys) return;
    APTC_LOAD_SEEN(p);
    APTC_ZERO_SUM(r.sum[0]);
    APTC_ZERO_SUM(r.sum[1]);
    for (int32_t h = 0; h < job.share; h++) {
        p.head = group * job.share + h;
        for (int64_t q0 = 0; q0 < p.queries; q0 += job.tile) {
            if (aptc_seen_keys(&job, &p, q0) <= k0) continue;
            APTC_BARRIER;
            APTC_LOAD_GIVEN(p);
            APTC_BARRIER;
            APTC_GRADIENT_TILE(p);
            APTC_BARRIER;
            aptc_tile_multiply(&dk, job.type);
            aptc_tile_multiply(&dv, job.type);
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) for (int32_t i = t / APTC_WARP; i < job.tile && k0 + i < p.keys; i += APTC_WARPS)
        for (int32_t c = t % APTC_WARP; c < job.dim; c += APTC_WARP) {
            const int64_t row = p.k_row + k0 + i, column = group * job.dim + c;
            if (job.dk.data != NULL) aptc_set(&job.dk, row, column, job.scale * acc_k[i * r.ld_sum + c]);
            if (job.dv.data != NULL) aptc_set(&job.dv, row, column, acc_v[i * r.ld_sum + c]);
        }
}
APTC_LAUNCHER(aptc_attention_dkv_kernel, aptc_attention)

/* Thread t's share of dS of 16 rows and `count` others, from logits in s and dO V^T in slope, in pairs; lse and dot belong to the
   two rows, and so does `seen`, see aptc_flash_limit. */
APTC_INLINE void aptc_flash_slopes(apt_dtype type, uint32_t *ds, const float *s, float *slope, const float *lse, const float *dot,
                                   const int32_t *seen, int32_t count)
{
    APTC_UNROLL for (int32_t e = 0; e < count / 2; e++) {
        const int32_t h = e / 2 % 2;
        slope[e] = aptc_flash_column(0, e) < seen[h] ? expf(s[e] - lse[h]) * (slope[e] - dot[h]) : 0.0f;
    }
    APTC_UNROLL for (int32_t e = 0; e < count / 4; e++) ds[e] = aptc_pack(type, slope[2 * e], slope[2 * e + 1]);
}

/* Block: BX = tile of queries, BY = (sequence, head) */
APTC_INLINE void aptc_flash_dq(const aptc_attention *a, int32_t wide, apt_dtype type, int64_t bx, int64_t by)
{
    APTC_DYNAMIC(float, room, APTC_ROOM_BYTES / 4);
    APTC_FRAGMENT(float, s);
    APTC_FRAGMENT(float, slope);
    APTC_FRAGMENT(float, lse);
    APTC_FRAGMENT(float, dot);
    APTC_FRAGMENT(float, dq);
    APTC_FRAGMENT(uint32_t, ds);
    const aptc_flash f = aptc_flash_of(wide, true);
    const aptc_place p = aptc_place_of(a, by / a->heads, (int32_t)(by % a->heads));
    const int32_t q0 = (int32_t)bx * APTC_FLASH_ROWS, seen = (int32_t)aptc_seen_keys(a, &p, q0);
    const int32_t rows = (int32_t)aptc_max(0, aptc_min(APTC_FLASH_ROWS, p.queries - q0)), warps = (rows + 15) / 16;
    uint16_t *q = (uint16_t *)room, *d_o = q + f.own, *others = d_o + f.own;
    float *diagonals = (float *)(others + 2 * f.stages * f.other);
    APTC_THREADS(t) aptc_attention_sums(a, bx, by, t, a->d_o, p.q_row + q0, (int64_t)p.head * a->dim, rows);
    if (rows == 0) return;
    APTC_FLASH_LOAD_QUERIES(q, a->q, q0, 16 * warps, 1.0f);
    APTC_FLASH_LOAD_QUERIES(d_o, a->d_o, q0, 16 * warps, a->mask != NULL ? a->mask[p.group] : 1.0f);
    APTC_THREADS(t) {
        APTC_UNROLL for (int32_t h = 0; h < 2; h++) {
            const int64_t i = q0 + aptc_flash_row(t, 2 * h), at = (p.q_row + i) * a->heads + p.head;
            APTC_MINE(lse, t)[h] = i < p.queries ? a->lse[at] : 0.0f;
            APTC_MINE(dot, t)[h] = i < p.queries ? a->dot[at] : 0.0f;
        }
        APTC_UNROLL for (int32_t e = 0; e < wide / 2; e++) APTC_MINE(dq, t)[e] = 0;
    }
    for (int32_t turn = 1 - f.stages; turn * f.tile < seen; turn++) {
        const int32_t k0 = turn * f.tile, next = k0 + (f.stages - 1) * f.tile, here = turn & (f.stages - 1);
        APTC_FLASH_LOAD_NEXT(turn, next);
        if (turn < 0) continue;
        APTC_FLASH_WAIT(f);
        APTC_NO_UNROLL for (int32_t n = 0; n < f.tile && k0 + n < seen; n += APTC_FLASH_STEP) {
            const uint16_t *k = others + here * 2 * f.other + n * f.ld;
            aptc_flash_dots(type, warps, s, q, k, wide, APTC_FLASH_STEP);
            aptc_flash_dots(type, warps, slope, d_o, k + f.other, wide, APTC_FLASH_STEP);
            APTC_THREADS(t) {
                int32_t limit[2];
                APTC_UNROLL for (int32_t h = 0; h < 2; h++)
                    limit[h] = aptc_flash_limit(a, &p, t, h, q0, k0 + n);
                aptc_flash_logits(a, t, APTC_MINE(s, t), diagonals + here * f.floats + APTC_FLASH_ROWS - 1 + n, APTC_FLASH_STEP,
                                  false);
                aptc_flash_slopes(type, APTC_MINE(ds, t), APTC_MINE(s, t), APTC_MINE(slope, t), APTC_MINE(lse, t),
                                  APTC_MINE(dot, t), limit, APTC_FLASH_STEP);
            }
            aptc_flash_add(type, warps, dq, ds, k, wide, APTC_FLASH_STEP);
        }
        APTC_BARRIER;
    }
    APTC_COPIES_WAIT(0);
    aptc_flash_end(a, wide, room, dq, a->scale, &a->dq, p.q_row + q0, p.head * a->dim, rows);
}

APTC_FLASH_KERNELS(aptc_flash_dq)

/* Thread t's share of what the block needs to know of the queries from q0 on: 0 where there are none */
APTC_INLINE void aptc_flash_given(const aptc_attention *a, const aptc_place *p, int32_t t, float *lse, float *dot, int32_t q0,
                                  int32_t tile)
{
    const int64_t at = (p->q_row + q0 + t) * a->heads + p->head;
    if (t < tile) lse[t] = q0 + t < p->queries ? a->lse[at] : 0.0f;
    if (t < tile) dot[t] = q0 + t < p->queries ? a->dot[at] : 0.0f;
}

/* Thread t's share of P^T and dS^T of 16 keys, of those from k0 on, and `count` queries from q0 on, as above; lse and dot are
   those of the queries. */
APTC_INLINE void aptc_flash_slopes_turned(const aptc_attention *a, const aptc_place *p, apt_dtype type, uint32_t *prob,
                                          uint32_t *ds, float *s, float *slope, const float *lse, const float *dot, int32_t q0,
                                          int32_t k0, int32_t t, int32_t count)
{
    const int32_t c = aptc_flash_column(t, 0), end = (int32_t)p->queries - q0 - c;
    int32_t first[2];                            /* query that sees the key */
    APTC_UNROLL for (int32_t h = 0; h < 2; h++) {
        const int32_t j = k0 + aptc_flash_row(t, 2 * h);
        first[h] = j >= (int32_t)p->keys ? count : a->causal ? j - (int32_t)p->shift - q0 - c : 0;
    }
    APTC_UNROLL for (int32_t e = 0; e < count / 2; e++) {
        const int32_t column = aptc_flash_column(0, e);
        const bool sees = column >= first[e / 2 % 2] && column < end;
        s[e] = sees ? expf(s[e] - lse[c + column]) : 0.0f;
        slope[e] = sees ? s[e] * (slope[e] - dot[c + column]) : 0.0f;
    }
    APTC_UNROLL for (int32_t e = 0; e < count / 4; e++) {
        prob[e] = aptc_pack(type, s[2 * e], s[2 * e + 1]);
        ds[e] = aptc_pack(type, slope[2 * e], slope[2 * e + 1]);
    }
}

/* Block: BX = tile of keys, BY = (sequence, key head). It walks over the queries of all heads of the group that see its keys. */
APTC_INLINE void aptc_flash_dkv(const aptc_attention *a, int32_t wide, apt_dtype type, int64_t bx, int64_t by)
{
    APTC_DYNAMIC(float, room, APTC_ROOM_BYTES / 4);
    APTC_FRAGMENT(float, s);
    APTC_FRAGMENT(float, slope);
    APTC_FRAGMENT(float, dk);
    APTC_FRAGMENT(float, dv);
    APTC_FRAGMENT(uint32_t, prob);
    APTC_FRAGMENT(uint32_t, ds);
    const aptc_flash f = aptc_flash_of(wide, true);
    const int32_t step = wide == 64 ? 16 : 32;            /* queries in registers at a time: two blocks have room for no more */
    const int32_t groups = a->heads / a->share, group = (int32_t)(by % groups);
    aptc_place p = aptc_place_of(a, by / groups, group * a->share);
    const int32_t k0 = (int32_t)bx * APTC_FLASH_ROWS, rows = (int32_t)aptc_min(APTC_FLASH_ROWS, p.keys - k0);
    const int32_t warps = (rows + 15) / 16;
    const int32_t first = a->causal ? (int32_t)aptc_max(0, k0 - p.shift) / f.tile * f.tile : 0;    /* queries that see a key */
    const int32_t turns = (int32_t)aptc_max(0, aptc_ceil(p.queries - first, f.tile)) * a->share;
    int32_t q0 = first, next = first, loaded = first;
    uint16_t *k = (uint16_t *)room, *v = k + f.own, *others = v + f.own;
    float *floats = (float *)(others + 2 * f.stages * f.other);
    if (rows <= 0) return;
    APTC_FLASH_LOAD_KEYS(k, a->k, k0, 16 * warps);
    APTC_FLASH_LOAD_KEYS(v, a->v, k0, 16 * warps);
    APTC_THREADS(t) APTC_UNROLL for (int32_t e = 0; e < wide / 2; e++) APTC_MINE(dk, t)[e] = APTC_MINE(dv, t)[e] = 0;
    for (int32_t turn = 1 - f.stages; turn < turns; turn++, q0 = loaded) {
        const int32_t here = turn & (f.stages - 1), coming = (turn + f.stages - 1) & (f.stages - 1);
        loaded = next;
        if (turn + f.stages - 1 < turns) {
            uint16_t *to = others + coming * 2 * f.other;
            float *known = floats + coming * f.floats;
            APTC_FLASH_LOAD_QUERIES(to, a->q, next, f.tile, 1.0f);
            APTC_FLASH_LOAD_QUERIES(to + f.other, a->d_o, next, f.tile, a->mask != NULL ? a->mask[group] : 1.0f);
            APTC_THREADS(t) {
                aptc_flash_given(a, &p, t, known, known + f.tile, next, f.tile);
                aptc_flash_bias(a, &p, t, known + 2 * f.tile, next, k0, f.tile, true);
            }
            next += f.tile;
            if (next >= p.queries) {
                next = first;
                p.head++;
            }
        }
        APTC_COPIES_END;
        if (turn < 0) continue;
        if (f.stages == 1) q0 = loaded;
        APTC_FLASH_WAIT(f);
        APTC_NO_UNROLL for (int32_t n = 0; n < f.tile && q0 + n < p.queries; n += step) {
            const uint16_t *q = others + here * 2 * f.other + n * f.ld, *d_o = q + f.other;
            const float *known = floats + here * f.floats + n;
            aptc_flash_dots(type, warps, s, k, q, wide, step);
            aptc_flash_dots(type, warps, slope, v, d_o, wide, step);
            APTC_THREADS(t) {
                aptc_flash_logits(a, t, APTC_MINE(s, t), known + 3 * f.tile - 1 - 2 * n, step, true);
                aptc_flash_slopes_turned(a, &p, type, APTC_MINE(prob, t), APTC_MINE(ds, t), APTC_MINE(s, t), APTC_MINE(slope, t),
                                         known, known + f.tile, q0 + n, k0, t, step);
            }
            if (a->dv.data != NULL) aptc_flash_add(type, warps, dv, prob, d_o, wide, step);
            if (a->dk.data != NULL) aptc_flash_add(type, warps, dk, ds, q, wide, step);
        }
        APTC_BARRIER;
    }
    APTC_COPIES_WAIT(0);
    if (a->dk.data != NULL) aptc_flash_end(a, wide, room, dk, a->scale, &a->dk, p.k_row + k0, group * a->dim, rows);
    if (a->dv.data != NULL) aptc_flash_end(a, wide, room, dv, 1.0f, &a->dv, p.k_row + k0, group * a->dim, rows);
}

APTC_FLASH_KERNELS(aptc_flash_dkv)

/* Block: BY = (sequence, head): its row of dbias, tile after tile; thread u of a tile takes the diagonal u */
APTC_KERNEL(aptc_attention_dbias_kernel, aptc_attention)
{
    APTC_ROOM(APTC_DBIAS_ROOM);
    float *diagonal = APTC_FLOATS(r.vector[0]);           /* and the vector behind it: 2 * tile */
    const float *ds = APTC_FLOATS(r.square[1]);
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t wide = 2 * (int64_t)job.span - 1;
    const int32_t diagonals = 2 * job.tile - 1;
    float *out = job.dbias + APTC_BY * wide;
    APTC_THREADS(t) for (int64_t u = t; u < wide; u += APTC_BLOCK) out[u] = 0;
    for (int64_t q0 = 0; q0 < p.queries; q0 += job.tile) {
        APTC_BARRIER;
        APTC_LOAD_GIVEN(p);
        for (int64_t k0 = 0; k0 < p.keys; k0 += job.tile) {
            APTC_BARRIER;
            APTC_LOAD_SEEN(p);
            APTC_BARRIER;
            APTC_GRADIENT_TILE(p);
            APTC_BARRIER;
            APTC_THREADS(t) if (t < diagonals) {          /* key - query = k0 - q0 + t - (tile - 1) */
                float total = 0;
                for (int32_t i = 0; i < job.tile; i++) {
                    const int32_t c = i + t - (job.tile - 1);
                    if (c >= 0 && c < job.tile) total += ds[i * r.ld_square + c];
                }
                diagonal[t] = total;
            }
            APTC_BARRIER;
            /* Far diagonals share the last entries of the table: those are added by one thread, in order. */
            APTC_THREADS(t) {
                const int64_t last = job.span - 1, d0 = k0 - q0 - p.shift - (job.tile - 1);
                const int64_t distance = d0 + t;
                if (t < diagonals && distance > -last && distance < last) out[distance + last] += diagonal[t];
                for (int32_t u = 0; t == 0 && u < diagonals; u++) {
                    if (d0 + u <= -last) out[0] += diagonal[u];
                    else if (d0 + u >= last) out[wide - 1] += diagonal[u];
                }
            }
        }
    }
}
APTC_LAUNCHER(aptc_attention_dbias_kernel, aptc_attention)

static aptc_attention aptc_attention_of(aptc_device *d, const apti_attention_job *op)
{
    const apti_attention_op *o = op->op;
    aptc_attention a;
    memset(&a, 0, sizeof a);
    const int64_t keys = (int64_t)o->kv_heads * o->head_dim;
    a.q = aptc_in(d, op->q, op->ldq, op->rows_q, (int64_t)o->heads * o->head_dim);
    a.k = aptc_in_rows(d, op->k, op->ldk, keys);
    a.v = aptc_in_rows(d, op->v, op->ldv, keys);
    a.bias = o->bias;
    a.mask = o->head_mask;
    a.q_offsets = o->q_offsets;
    a.k_offsets = o->k_offsets;
    a.k_ends = o->k_ends;
    a.heads = o->heads;
    a.share = o->heads / o->kv_heads;
    a.dim = o->head_dim;
    a.span = o->bias_span;
    a.sequences = o->sequences;
    a.causal = o->causal;
    a.scale = o->scale;
    a.type = aptc_math_type(d);
    a.wide = (a.dim + 15) / 16 * 16;
    return a;
}

/* Tiles as large as the longest sequences, APTC_TILE_MAX and the shared memory let them be; fits: there is room for some. The
   backward's are square. */
#define APTC_TILE_CHOOSE(d, a, longest_q, longest_k, layout, fits)                                                      \
    do {                                                                                                                \
        (a).rows = (int32_t)aptc_max(16, aptc_min(APTC_TILE_MAX, aptc_ceil(longest_q, 16) * 16));                       \
        (a).tile = (int32_t)aptc_max(16, aptc_min(APTC_TILE_MAX, aptc_ceil(longest_k, 16) * 16));                       \
        while (layout(&(a)).end > (d)->room && ((a).rows > 16 || (a).tile > 16)) {                                      \
            if ((a).rows > 16) (a).rows -= 16;                                                                          \
            if ((a).tile > 16) (a).tile -= 16;                                                                          \
        }                                                                                                               \
        fits = layout(&(a)).end <= (d)->room;                                                                           \
    } while (0)

/* The same for halves, whose tiles are what they are */
static bool aptc_flash_choose(const aptc_device *d, aptc_attention *a, bool backward)
{
    a->wide = a->dim > 64 ? 128 : a->dim > 32 ? 64 : 32;
    a->rows = APTC_FLASH_ROWS;
    return aptc_flash_of(a->wide, backward).bytes <= d->room;
}

static bool aptc_attention_forward_op(aptc_device *d, const apti_attention_job *op)
{
    aptc_attention a = aptc_attention_of(d, op);
    bool fits;
    if (a.dim > APTC_HEAD_MAX || (int64_t)a.sequences * a.heads > APTC_GRID_ROWS) return false;
    const int64_t longest_k = a.k_ends != NULL ? (int64_t)APTC_TILE_MAX : op->longest_k;      /* a cache has room for many */
    if (a.type == APT_F32) APTC_TILE_CHOOSE(d, a, op->longest_q, longest_k, APTC_FORWARD_ROOM, fits);
    else fits = aptc_flash_choose(d, &a, false);
    if (!fits) return false;
    a.blocks = aptc_ceil(op->longest_q, a.rows);
    a.o = aptc_out(d, op->out, op->ldo, op->rows_q, (int64_t)a.heads * a.dim);
    aptc_out_floats(d, op->lse, op->rows_q * a.heads);
    a.lse_out = op->lse;
    d->waiting.attention = a;
    aptc_wait(d, APTC_ATTENTION, op->out, op->ldo, op->rows_q, (int64_t)a.heads * a.dim);
    return true;
}

static void aptc_attention_forward_run(aptc_device *d, aptc_attention *a, const apti_column_job *sizes,
                                       const apti_column_job *sums)
{
    const int64_t rows = aptc_sum_rows(a);
    a->sizes = aptc_sizes_for(d, sizes, rows);
    a->sums = aptc_sizes_for(d, sums, rows);
    if (sums != NULL && a->sums == NULL) a->sizes = NULL;            /* room for both or for none */
    const int64_t pairs = (int64_t)a->sequences * a->heads;
    if (a->type == APT_F32)
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_forward_kernel, *a, a->blocks, pairs, APTC_FORWARD_ROOM(a).end);
    else APTC_LAUNCH_FLASH(d, aptc_flash_forward, *a, a->blocks, pairs, aptc_flash_of(a->wide, false).bytes);
    aptc_sizes_add(d, a->sizes, sizes, rows);
    aptc_sizes_add(d, a->sums, sums, rows);
}

/* dot(rows, heads) of the backward, and rest */
static void aptc_attention_dots(aptc_device *d, const apti_attention_job *op, aptc_attention *given, float *dot, float *rest)
{
    aptc_attention a = *given;
    a.dot_out = dot;
    a.rest_out = rest;
    given->dot = dot;
    if (op->o == NULL || d->math == APT_CUDA_FP32) {
        given->rest = rest;
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_sweep_kernel, a, aptc_ceil(op->longest_q, a.tile), (int64_t)a.sequences * a.heads,
                            APTC_SWEEP_ROOM(&a).end);
        return;
    }
    a.o = aptc_in(d, op->o, op->ldo, op->rows_q, (int64_t)a.heads * a.dim);
    a.pairs = op->rows_q * a.heads;
    APTC_LAUNCH(d, aptc_attention_dot_kernel, a, aptc_ceil(a.pairs, APTC_WARPS), 1);
}

/* dq, which also adds up d_o, dk and dv */
static void aptc_attention_backward_run(aptc_device *d, const apti_attention_job *op, aptc_attention *queries,
                                        aptc_attention *keys)
{
    const int64_t pairs = (int64_t)keys->sequences * keys->heads, groups = pairs / keys->share;
    const int64_t blocks = aptc_ceil(op->longest_k, keys->type == APT_F32 ? keys->tile : APTC_FLASH_ROWS);
    const bool wanted = op->dk != NULL || op->dv != NULL;
    if (keys->type == APT_F32) {
        if (op->dq != NULL)
            APTC_LAUNCH_DYNAMIC(d, aptc_attention_dq_kernel, *queries, queries->blocks, pairs, APTC_DQ_ROOM(queries).end);
        if (wanted) APTC_LAUNCH_DYNAMIC(d, aptc_attention_dkv_kernel, *keys, blocks, groups, APTC_DKV_ROOM(keys).end);
    } else {
        const int64_t bytes = aptc_flash_of(keys->wide, true).bytes;
        if (op->dq != NULL) APTC_LAUNCH_FLASH(d, aptc_flash_dq, *queries, queries->blocks, pairs, bytes);
        if (wanted) APTC_LAUNCH_FLASH(d, aptc_flash_dkv, *keys, blocks, groups, bytes);
    }
}

static bool aptc_attention_backward_op(aptc_device *d, const apti_attention_job *op, const apti_column_job *sum)
{
    aptc_attention a = aptc_attention_of(d, op), keys;
    const int64_t pairs = (int64_t)a.sequences * a.heads, wide = 2 * (int64_t)a.span - 1;
    bool fits;
    if (a.dim > APTC_HEAD_MAX || pairs > APTC_GRID_ROWS) return false;
    const int64_t longest = aptc_max(op->longest_q, op->longest_k);
    APTC_TILE_CHOOSE(d, a, longest, longest, APTC_DKV_ROOM, fits);        /* the largest of them */
    if (!fits) return false;
    float *dot = (float *)aptc_take(d, 2 * op->rows_q * a.heads * (int64_t)sizeof(float));
    a.dbias = op->dbias == NULL ? NULL : (float *)aptc_take(d, pairs * wide * (int64_t)sizeof(float));
    if (dot == NULL || (op->dbias != NULL && a.dbias == NULL)) return false;
    const int64_t width = (int64_t)a.heads * a.dim;
    a.d_o = aptc_in(d, op->d_o, op->lddo, op->rows_q, width);
    a.lse = op->saved;
    a.dq = aptc_out(d, op->dq, op->lddq, op->rows_q, width);
    a.dk = aptc_out(d, op->dk, op->lddk, op->rows_k, width / a.share);
    a.dv = aptc_out(d, op->dv, op->lddv, op->rows_k, width / a.share);
    aptc_attention_dots(d, op, &a, dot, dot + op->rows_q * a.heads);
    keys = a;
    if (a.type != APT_F32 && !aptc_flash_choose(d, &keys, true)) return false;
    aptc_attention queries = keys;
    queries.blocks = aptc_ceil(op->longest_q, keys.rows);
    queries.sizes = aptc_sizes_for(d, sum, aptc_sum_rows(&queries));
    aptc_attention_backward_run(d, op, &queries, &keys);
    if (op->dbias != NULL) {
        const aptc_fold fold = {op->dbias, a.dbias, NULL, a.sequences, a.heads * wide, a.heads * wide, false};
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_dbias_kernel, a, 1, pairs, APTC_DBIAS_ROOM(&a).end);
        APTC_LAUNCH_FOLD(d, fold);
    }
    aptc_sizes_add(d, queries.sizes, sum, aptc_sum_rows(&queries));
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Products
   ------------------------------------------------------------------------------------------------------------------ */

/* One operand of a product. */
typedef struct aptc_operand {
    const void *data;
    int64_t ld;
    apt_dtype type;
    int32_t transposed;               /* A: (k, m) in memory; B: (n, k) in memory */
} aptc_operand;

/* c(m, n) = a b [+ c] [+ bias], all row-major. */
typedef struct aptc_product {
    aptc_operand a, b;
    aptc_view c;
    const void *bias;                 /* of c's type, or NULL */
    int64_t m, n, k, accumulate;
} aptc_product;

#ifdef APT_CUDA_EMULATE
/* Block: row BX */
APTC_KERNEL(aptc_product_kernel, aptc_product)
{
    const int64_t i = APTC_BX;
    for (int64_t j = 0; j < job.n; j++) {
        double sum = job.accumulate != 0 ? (double)aptc_get(&job.c, i, j) : 0.0;
        for (int64_t p = 0; p < job.k; p++)
            sum += (double)aptc_load(job.a.data, job.a.type, job.a.transposed ? p * job.a.ld + i : i * job.a.ld + p) *
                   (double)aptc_load(job.b.data, job.b.type, job.b.transposed ? j * job.b.ld + p : p * job.b.ld + j);
        if (job.bias != NULL) sum += (double)aptc_load(job.bias, (apt_dtype)job.c.type, j);
        aptc_set(&job.c, i, j, (float)sum);
    }
}
APTC_LAUNCHER(aptc_product_kernel, aptc_product)

static void aptc_product_run(aptc_device *d, const aptc_product *p)
{
    APTC_LAUNCH(d, aptc_product_kernel, *p, p->m, 1);
}
#else
static void aptc_blas_check(aptc_device *d, cublasStatus_t status, const char *what)
{
    if (status != CUBLAS_STATUS_SUCCESS) aptc_fail(d, APT_E_DEVICE, "%s: %s", what, cublasLtGetStatusString(status));
}

/* Largest power of two up to 16 that divides an address; what is cut from a matrix of halves may begin at an odd one. */
static uint32_t aptc_alignment(const void *p)
{
    const uintptr_t a = (uintptr_t)p;
    return a % 16 == 0 ? 16 : a % 8 == 0 ? 8 : a % 4 == 0 ? 4 : 2;
}

/* What cuBLASLt is told about one product. It has columns where we have rows: C^T = B^T A^T. */
typedef struct aptc_blas {
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulPreference_t preference;
} aptc_blas;

static void aptc_blas_free(aptc_blas *x)
{
    if (x->preference != NULL) cublasLtMatmulPreferenceDestroy(x->preference);
    if (x->c != NULL) cublasLtMatrixLayoutDestroy(x->c);
    if (x->b != NULL) cublasLtMatrixLayoutDestroy(x->b);
    if (x->a != NULL) cublasLtMatrixLayoutDestroy(x->a);
    if (x->desc != NULL) cublasLtMatmulDescDestroy(x->desc);
}

static cudaDataType_t aptc_blas_type(apt_dtype type)
{
    return type == APT_BF16 ? CUDA_R_16BF : type == APT_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static void aptc_blas_make(aptc_device *d, aptc_blas *x, const aptc_product *p)
{
    const cublasComputeType_t compute = d->math == APT_CUDA_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    const cudaDataType_t type = aptc_blas_type(p->a.type), type_c = aptc_blas_type((apt_dtype)p->c.type);
    const cublasOperation_t first = p->b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = p->a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t bias = CUBLASLT_EPILOGUE_BIAS;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;    /* no atomics */
    const uint32_t align_a = aptc_alignment(p->b.data), align_b = aptc_alignment(p->a.data), align_c = aptc_alignment(p->c.data);
    aptc_blas_check(d, cublasLtMatmulDescCreate(&x->desc, compute, CUDA_R_32F), "cublasLtMatmulDescCreate");
    if (x->desc == NULL) return;
    cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    if (p->bias != NULL) {
        cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &bias, sizeof bias);
        cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type_c, sizeof type_c);
        cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    }
    aptc_blas_check(d, cublasLtMatrixLayoutCreate(&x->a, type, (uint64_t)(p->b.transposed ? p->k : p->n),
                                                  (uint64_t)(p->b.transposed ? p->n : p->k), p->b.ld), "layout of B");
    aptc_blas_check(d, cublasLtMatrixLayoutCreate(&x->b, type, (uint64_t)(p->a.transposed ? p->m : p->k),
                                                  (uint64_t)(p->a.transposed ? p->k : p->m), p->a.ld), "layout of A");
    aptc_blas_check(d, cublasLtMatrixLayoutCreate(&x->c, type_c, (uint64_t)p->n, (uint64_t)p->m, p->c.ld), "layout of C");
    aptc_blas_check(d, cublasLtMatmulPreferenceCreate(&x->preference), "cublasLtMatmulPreferenceCreate");
    if (x->preference == NULL) return;
    cublasLtMatmulPreferenceSetAttribute(x->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &d->blas_bytes,
                                         sizeof d->blas_bytes);
    cublasLtMatmulPreferenceSetAttribute(x->preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes);
    cublasLtMatmulPreferenceSetAttribute(x->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a);
    cublasLtMatmulPreferenceSetAttribute(x->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b);
    cublasLtMatmulPreferenceSetAttribute(x->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c);
    cublasLtMatmulPreferenceSetAttribute(x->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c);
}

/* The algorithm for this form of product: asked once, so that it is the same every time. */
static const cublasLtMatmulAlgo_t *aptc_blas_algorithm(aptc_device *d, const aptc_blas *x, const aptc_product *p)
{
    aptc_algorithm key;
    memset(&key, 0, sizeof key);
    key.m = p->m;
    key.n = p->n;
    key.k = p->k;
    key.lda = p->a.ld;
    key.ldb = p->b.ld;
    key.ldc = p->c.ld;
    key.form = 1 | p->a.transposed << 1 | p->b.transposed << 2 | (p->bias != NULL) << 3 | (p->accumulate != 0) << 4 |
               (p->a.type == APT_BF16) << 5 | (p->a.type == APT_F16) << 6 | (p->c.type == APT_BF16) << 7 |
               (int32_t)(aptc_alignment(p->a.data) << 8 | aptc_alignment(p->b.data) << 16 | aptc_alignment(p->c.data) << 24);
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < offsetof(aptc_algorithm, algorithm); i++) hash = (hash ^ ((const uint8_t *)&key)[i]) * 1099511628211u;
    aptc_algorithm *slot = NULL;
    for (int32_t i = 0; i < APTC_ALGORITHMS; i++) {
        slot = &d->algorithms[(hash + (uint64_t)i) % APTC_ALGORITHMS];
        if (slot->form == 0) break;
        if (memcmp(slot, &key, offsetof(aptc_algorithm, algorithm)) == 0) return &slot->algorithm;
    }
    if (slot->form != 0) memset(slot, 0, sizeof *slot);           /* full: the place of another */
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    aptc_blas_check(d, cublasLtMatmulAlgoGetHeuristic(d->blas, x->desc, x->a, x->b, x->c, x->c, x->preference, 1, &best, &found),
                    "cublasLtMatmulAlgoGetHeuristic");
    if (found == 0) {
        aptc_fail(d, APT_E_UNSUPPORTED, "cuBLASLt has no algorithm for a product %lld x %lld x %lld", (long long)p->m,
                  (long long)p->n, (long long)p->k);
        return NULL;
    }
    *slot = key;
    slot->algorithm = best.algo;
    return &slot->algorithm;
}

static void aptc_product_issue(aptc_device *d, const void *job)
{
    const aptc_product *p = (const aptc_product *)job;
    const float one = 1, beta = p->accumulate != 0 ? 1.0f : 0.0f;
    aptc_blas x;
    memset(&x, 0, sizeof x);
    aptc_blas_make(d, &x, p);
    const cublasLtMatmulAlgo_t *algorithm = d->result == APT_OK ? aptc_blas_algorithm(d, &x, p) : NULL;
    if (algorithm != NULL)
        aptc_blas_check(d, cublasLtMatmul(d->blas, x.desc, &one, p->b.data, x.a, p->a.data, x.b, &beta, p->c.data, x.c,
                                          p->c.data, x.c, algorithm, d->blas_work, d->blas_bytes, d->stream), "cublasLtMatmul");
    aptc_blas_free(&x);
}

static void aptc_product_run(aptc_device *d, const aptc_product *p)
{
    APTC_PUT(d, NULL, "cublasLtMatmul", *p, 1, 1, 0);
}
#endif

/* Forgets the kept operands that lie in the given bytes. */
static void aptc_unkeep(aptc_device *d, const void *data, int64_t bytes)
{
    const uintptr_t first = (uintptr_t)data, end = first + (uintptr_t)bytes;
    for (int32_t i = 0; i < APTC_KEPT; i++)
        if (d->kept[i].first < end && first < d->kept[i].end) memset(&d->kept[i], 0, sizeof d->kept[i]);
}

/* Where the converted form of an operand goes when it is kept; *here: there it is already. NULL: not kept */
static void *aptc_keep(aptc_device *d, const aptc_cast *job, bool *here)
{
    const int64_t size_from = aptc_size((apt_dtype)job->from.type), size_to = aptc_size((apt_dtype)job->to.type);
    aptc_kept want;
    memset(&want, 0, sizeof want);
    want.first = (uintptr_t)job->from.data;
    want.end = want.first + (uintptr_t)(((job->rows - 1) * job->from.ld + job->n) * size_from);
    want.rows = job->rows;
    want.cols = job->n;
    want.ld = job->from.ld;
    *here = false;
    if (job->rows * job->n < APTC_KEPT_ELEMENTS || job->rows * job->to.ld * size_to > d->kept_bytes) return NULL;
    for (int32_t i = 0; i < APTC_KEPT && !*here; i++) {
        *here = memcmp(&d->kept[i], &want, sizeof want) == 0;
        if (*here) d->kept_next = i;
    }
    const int32_t slot = d->kept_next;
    d->kept_next = (slot + 1) % APTC_KEPT;
    d->kept[slot] = want;
    return d->kept_work + slot * d->kept_bytes;
}

/* An operand (rows, cols in memory) in the type that the product computes in: as it is, or converted into the workspace, and kept
   there for the products behind it if `keep`. NULL data: no room. */
static aptc_operand aptc_convert(aptc_device *d, aptc_operand x, int64_t rows, int64_t cols, apt_dtype type, bool keep)
{
    if (x.type == type) return x;
    const int64_t ld = (cols + 7) / 8 * 8;
    aptc_cast job = {{NULL, ld, type}, {(void *)(uintptr_t)x.data, x.ld, x.type}, rows, cols};
    bool here = false;
    if (keep) job.to.data = aptc_keep(d, &job, &here);
    if (job.to.data == NULL) job.to.data = aptc_take(d, rows * ld * aptc_size(type));
    if (job.to.data != NULL && !here) APTC_LAUNCH_EACH(d, aptc_cast_kernel, job);
    x.data = job.to.data;
    x.type = type;
    x.ld = ld;
    return x;
}

static aptc_operand aptc_operand_of(aptc_view x, bool transposed)
{
    const aptc_operand o = {x.data, x.ld, (apt_dtype)x.type, transposed};
    return o;
}

static aptc_operand aptc_left(aptc_device *d, const apti_gemm *g, const apti_gemm_part *part)
{
    if (part->a_col != 1) return aptc_operand_of(aptc_in(d, part->a, part->a_col, part->k, g->m), true);
    return aptc_operand_of(aptc_in(d, part->a, part->a_row, g->m, part->k), false);
}

static aptc_operand aptc_right(aptc_device *d, const apti_gemm *g, const apti_gemm_part *part)
{
    const bool transposed = part->kind == APTI_B_PACKED || part->kind == APTI_B_PLAIN_T;
    if (part->kind == APTI_B_PACKED || part->kind == APTI_B_PACKED_T) {
        const aptc_view packed = {part->packed->data, part->packed->k, part->packed->type};
        return aptc_operand_of(packed, transposed);
    }
    return aptc_operand_of(aptc_in(d, part->b, part->ldb, transposed ? g->n : part->k, transposed ? part->k : g->n), transposed);
}

static int64_t aptc_bytes(int64_t rows, int64_t cols) { return (rows * ((cols + 7) / 8 * 8) * 4 + 255) / 256 * 256; }

/* The operands of a part of a product. */
typedef struct aptc_factors { aptc_operand a, b; int64_t k; bool packed; } aptc_factors;

/* c [= or +=] one part of a product [+ bias]. Where the workspace cannot take the whole of an operand, the reduction or the rows
   are cut. */
static bool aptc_part_run(aptc_device *d, const apti_gemm *g, const aptc_factors *part, aptc_view c, bool accumulate,
                          const void *bias)
{
    const apt_dtype type = aptc_math_type(d);
    const aptc_operand a = part->a, b = part->b;
    const int64_t room = (int64_t)(d->work_bytes - d->used) / 2, size_a = aptc_size(a.type), size_b = aptc_size(b.type);
    int64_t step_k = part->k, step_m = g->m;
    if (b.type != type || a.type != type) {
        while (step_k > 64 && aptc_bytes(b.transposed ? g->n : step_k, b.transposed ? step_k : g->n) > room)
            step_k = (step_k + 1) / 2;
        while (step_m > 64 && aptc_bytes(a.transposed ? step_k : step_m, a.transposed ? step_m : step_k) > room)
            step_m = (step_m + 1) / 2;
    }
    const size_t used = d->used;
    const bool keep = step_k == part->k && step_m == g->m;
    for (int64_t p0 = 0; p0 < part->k; p0 += step_k) {
        const int64_t k = aptc_min(step_k, part->k - p0);
        aptc_operand right = b;
        right.data = (const char *)b.data + (b.transposed ? p0 : p0 * b.ld) * size_b;
        right = aptc_convert(d, right, b.transposed ? g->n : k, b.transposed ? k : g->n, type, keep && !part->packed);
        const size_t beside = d->used;
        for (int64_t i0 = 0; i0 < g->m; i0 += step_m) {
            const int64_t m = aptc_min(step_m, g->m - i0);
            aptc_operand left = a;
            left.data = (const char *)a.data + (a.transposed ? p0 * a.ld + i0 : i0 * a.ld + p0) * size_a;
            left = aptc_convert(d, left, a.transposed ? k : m, a.transposed ? m : k, type, keep);
            if (left.data == NULL || right.data == NULL) return false;
            const aptc_view rows = {(char *)c.data + i0 * c.ld * aptc_size((apt_dtype)c.type), c.ld, c.type};
            const aptc_product product = {left, right, rows, p0 == 0 ? bias : NULL, m, g->n, k, accumulate || p0 > 0};
            aptc_product_run(d, &product);
            d->used = beside;
        }
        d->used = used;
    }
    return true;
}

/* *out = the bias as cuBLASLt wants it, in the type of what it is added to; false: no room */
static bool aptc_bias(aptc_device *d, const void **out, const float *bias, int64_t n, apt_dtype type)
{
    *out = bias;
    if (bias == NULL || type == APT_F32) return true;
    const aptc_cast job = {{aptc_take(d, n * aptc_size(type)), n, type}, aptc_floats(bias, n), 1, n};
    if (job.to.data != NULL) APTC_LAUNCH_EACH(d, aptc_cast_kernel, job);
    *out = job.to.data;
    return job.to.data != NULL;
}

/* The views of a product's matrices. z, where the sums grow: pre where that is wanted, else c; where c still holds the residual,
   which is added without an activation before it, they grow on top of that (onto). All that is read is asked for before what is
   written. */
typedef struct aptc_gemm { aptc_factors part[2]; aptc_view z, c, pre, residual; bool onto; } aptc_gemm;

static bool aptc_onto(const apti_gemm *g) { return g->residual != NULL && g->residual == g->c && g->pre == NULL; }

static aptc_gemm aptc_gemm_of(aptc_device *d, const apti_gemm *g)
{
    aptc_gemm v;
    memset(&v, 0, sizeof v);
    for (int32_t q = 0; q < 2; q++) {
        v.part[q].k = g->part[q].k;
        if (g->part[q].k == 0) continue;
        v.part[q].a = aptc_left(d, g, &g->part[q]);
        v.part[q].b = aptc_right(d, g, &g->part[q]);
        v.part[q].packed = g->part[q].packed != NULL;
    }
    v.onto = aptc_onto(g);
    v.residual = aptc_in(d, g->residual, g->ld_residual, g->m, g->n);
    if (g->accumulate) v.c = aptc_in(d, g->c, g->ldc, g->m, g->n);
    else v.c = aptc_out_over(d, g->c, g->ldc, g->m, g->n, g->residual, &v.residual);
    v.pre = aptc_out(d, g->pre, g->ld_pre, g->m, g->n);
    v.z = g->pre != NULL ? v.pre : v.c;
    return v;
}

/* z [= or +=] the parts of the product [+ bias]; false: the workspace is too small */
static bool aptc_parts_run(aptc_device *d, const apti_gemm *g, const aptc_gemm *v, bool accumulate, const float *bias)
{
    const void *rest;
    if (!aptc_bias(d, &rest, bias, g->n, (apt_dtype)v->z.type)) return false;
    for (int32_t q = 0; q < 2; q++) {
        if (v->part[q].k == 0) continue;
        if (!aptc_part_run(d, g, &v->part[q], v->z, accumulate, rest)) return false;
        accumulate = true;
        rest = NULL;
    }
    return true;
}

/* What a product cannot do itself waits: an activation, a residual, a mask, and the bias where it is late: where z is halves,
   which it would be rounded for, or nothing is multiplied. */
static bool aptc_gemm_op(aptc_device *d, const apti_gemm *g)
{
    const bool product = g->part[0].k > 0 || g->part[1].k > 0;
    if (aptc_onto(g) && (g->act >= 0 || g->accumulate)) return false;
    if (g->pre != NULL && g->accumulate && g->bias != NULL && !product) return false;
    const aptc_gemm v = aptc_gemm_of(d, g);
    const bool grows = g->accumulate || v.onto, rest = g->act >= 0 || (g->residual != NULL && !v.onto) || g->mask != NULL;
    const bool late = g->bias != NULL && g->pre == NULL && (product ? rest && v.z.type != APT_F32 : grows);
    const float *bias = late ? NULL : g->bias;
    aptc_unkeep(d, g->c, ((g->m - 1) * g->ldc + g->n) * 4);
    if (g->pre != NULL) aptc_unkeep(d, g->pre, ((g->m - 1) * g->ld_pre + g->n) * 4);
    const aptc_cast start = {v.z, g->accumulate ? v.c : aptc_floats(bias, 0), g->m, g->n};
    if (g->accumulate ? g->pre != NULL : !product && !v.onto) APTC_LAUNCH_EACH(d, aptc_cast_kernel, start);
    if (product && !aptc_parts_run(d, g, &v, grows, bias)) {
        aptc_fail(d, APT_E_MEMORY, "a product %lld x %lld x %lld does not fit the workspace", (long long)g->m, (long long)g->n,
                  (long long)aptc_max(g->part[0].k, g->part[1].k));
        return true;
    }
    if (!rest && !late && g->pre == NULL) return true;
    const aptc_finish f = {v.c, v.z, v.onto ? aptc_floats(NULL, 0) : v.residual, late ? g->bias : NULL, g->mask, NULL, g->m, g->n,
                           g->act};
    d->waiting.finish = f;
    aptc_wait(d, APTC_FINISH, g->c, g->ldc, g->m, g->n);
    return true;
}

static bool aptc_pack_op(aptc_device *d, const apti_pack_job *op)
{
    const apti_packed *p = op->packed;
    const aptc_cast job = {{p->data, p->k, p->type}, aptc_floats(op->w, op->ldw), p->n, p->k};
    if (!aptc_has(p->type)) return false;
    if (job.rows > 0 && job.n > 0) APTC_LAUNCH_EACH(d, aptc_cast_kernel, job);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   What waits

   A sum of |x| may be asked for behind the operation that writes x, or in front of the one that reads it. So an operation that
   can add up what it writes waits for the one behind it, and so does a sum: either the two become one launch, or both are
   launched in their order. Attention also adds up x itself, which salience wants as well.
   ------------------------------------------------------------------------------------------------------------------ */

static bool aptc_same_matrix(const apti_column_job *sum, const float *x, int64_t ld, int64_t rows, int64_t n)
{
    return sum->x == x && sum->ldx == ld && sum->rows == rows && sum->n == n;
}

/* Launches what waits, with what was asked for or alone. */
static void aptc_settle(aptc_device *d)
{
    const aptc_waits waits = d->waits;
    const apti_column_job *sizes = d->asked[0].acc != NULL ? &d->asked[0] : NULL;
    const apti_column_job *sums = d->asked[1].acc != NULL ? &d->asked[1] : NULL;
    d->waits = APTC_NOTHING;
    switch (waits) {
    case APTC_NOTHING: return;
    case APTC_FINISH: aptc_finish_run(d, &d->waiting.finish, sizes); break;
    case APTC_GATE: aptc_gate_run(d, &d->waiting.gate, false, sizes); break;
    case APTC_ACT: aptc_act_backward_run(d, &d->waiting.act, sizes); break;
    case APTC_RESIDUAL: aptc_residual_run(d, &d->waiting.residual, sizes); break;
    case APTC_NORM: aptc_norm_forward_run(d, &d->waiting.norm, sizes); break;
    case APTC_ATTENTION: aptc_attention_forward_run(d, &d->waiting.attention, sizes, sums); break;
    case APTC_SUM: (void)aptc_column_op(d, &d->waiting.sum); break;           /* which has room: see aptc_sum_op */
    }
    memset(&d->written, 0, sizeof d->written);
    memset(d->asked, 0, sizeof d->asked);
    d->used = 0;                      /* what was launched has had its room */
}

/* Does the operation read the matrix of the sum in a kernel that can add it up? */
static bool aptc_reads(const apti_column_job *sum, apti_op op, const void *job)
{
    const apti_act_job *act = (const apti_act_job *)job;
    const apti_gate_job *g = (const apti_gate_job *)job;
    const apti_residual_job *r = (const apti_residual_job *)job;
    const apti_norm_job *n = (const apti_norm_job *)job;
    const apti_attention_job *a = (const apti_attention_job *)job;
    switch ((int)op) {
    case APTI_OP_ACT_BACKWARD: return aptc_same_matrix(sum, act->da, act->ldda, act->rows, act->n);
    case APTI_OP_GATE_BACKWARD: return aptc_same_matrix(sum, g->dh, g->lddh, g->rows, g->n);
    case APTI_OP_RESIDUAL: return aptc_same_matrix(sum, r->x, r->ldx, r->rows, r->n);
    case APTI_OP_NORM_BACKWARD: return n->y != NULL && aptc_same_matrix(sum, n->dy, n->lddy, n->rows, n->d);
    case APTI_OP_ATTENTION_BACKWARD:
        return a->dq != NULL && aptc_same_matrix(sum, a->d_o, a->lddo, a->rows_q, (int64_t)a->op->heads * a->op->head_dim);
    default: return false;
    }
}

/* The sum that waits, if it is of what the operation reads anyway; else NULL, and what waits is launched */
static const apti_column_job *aptc_sum_for(aptc_device *d, apti_op op, const void *job)
{
    if (d->waits == APTC_SUM && aptc_reads(&d->waiting.sum, op, job)) {
        d->waits = APTC_NOTHING;
        return &d->waiting.sum;
    }
    aptc_settle(d);
    return NULL;
}

static bool aptc_sum_op(aptc_device *d, const apti_column_job *op)
{
    const bool fits = (size_t)aptc_sizes_bytes(op->rows, op->n) <= d->work_bytes;      /* alone, if need be */
    const bool sizes = op->kind == APTI_COLUMN_ABS, sums = op->kind == APTI_COLUMN_SUM && d->waits == APTC_ATTENTION;
    const aptc_matrix *w = &d->written;
    apti_column_job *asked = &d->asked[sizes ? 0 : 1];
    if (fits && (sizes || sums) && asked->acc == NULL && aptc_same_matrix(op, w->x, w->ld, w->rows, w->n)) {
        *asked = *op;
        return true;
    }
    aptc_settle(d);
    if (!fits || !sizes) return aptc_column_op(d, op);
    d->waits = APTC_SUM;
    d->waiting.sum = *op;
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   The backend
   ------------------------------------------------------------------------------------------------------------------ */

static bool aptc_run(void *self, apti_op op, const void *job)
{
    aptc_device *d = (aptc_device *)self;
    bool done;
    d->used = 0;
    aptc_enter(d);
    const apti_column_job *sum = op == APTI_OP_COLUMN ? NULL : aptc_sum_for(d, op, job);
    if (op != APTI_OP_GEMM && op != APTI_OP_COLUMN && op != APTI_OP_SQUARES) memset(d->kept, 0, sizeof d->kept);
    switch (op) {
    case APTI_OP_GEMM: return aptc_gemm_op(d, (const apti_gemm *)job);
    case APTI_OP_PACK: return aptc_pack_op(d, (const apti_pack_job *)job);
    case APTI_OP_COPY: aptc_copy_op(d, (const apti_copy_job *)job); return true;
    case APTI_OP_SCALE: aptc_scale_op(d, (const apti_scale_job *)job); return true;
    case APTI_OP_COLUMN: return aptc_sum_op(d, (const apti_column_job *)job);
    case APTI_OP_NORM_FORWARD: aptc_norm_forward_op(d, (const apti_norm_job *)job); return true;
    case APTI_OP_NORM_BACKWARD: done = aptc_norm_backward_op(d, (const apti_norm_job *)job, sum); break;
    case APTI_OP_ROTARY_TABLE: return aptc_rotary_op(d, (const apti_rotary_job *)job, true);
    case APTI_OP_ROTARY: return aptc_rotary_op(d, (const apti_rotary_job *)job, false);
    case APTI_OP_RELATIVE_FORWARD: return aptc_relative_op(d, (const apti_relative_job *)job, false);
    case APTI_OP_RELATIVE_BACKWARD: return aptc_relative_op(d, (const apti_relative_job *)job, true);
    case APTI_OP_ATTENTION_FORWARD: return aptc_attention_forward_op(d, (const apti_attention_job *)job);
    case APTI_OP_ATTENTION_BACKWARD: done = aptc_attention_backward_op(d, (const apti_attention_job *)job, sum); break;
    case APTI_OP_ACT_BACKWARD: aptc_act_backward_op(d, (const apti_act_job *)job, sum); return true;
    case APTI_OP_RESIDUAL: aptc_residual_op(d, (const apti_residual_job *)job, sum); return true;
    case APTI_OP_GATE_FORWARD: aptc_gate_forward_op(d, (const apti_gate_job *)job); return true;
    case APTI_OP_GATE_BACKWARD: aptc_gate_backward_op(d, (const apti_gate_job *)job, sum); return true;
    case APTI_OP_TANH_FORWARD: APTC_LAUNCH_EACH(d, aptc_tanh_forward_kernel, *(const apti_tanh_job *)job); return true;
    case APTI_OP_TANH_BACKWARD: APTC_LAUNCH_EACH(d, aptc_tanh_backward_kernel, *(const apti_tanh_job *)job); return true;
    case APTI_OP_EMBED: return aptc_embed_op(d, (const apti_embed_job *)job);
    case APTI_OP_GATHER: return aptc_gather_op(d, (const apti_rows_job *)job);
    case APTI_OP_SCATTER: return aptc_scatter_op(d, (const apti_rows_job *)job);
    case APTI_OP_CROSS_ENTROPY: return aptc_cross_entropy_op(d, (const apti_loss_job *)job);
    case APTI_OP_KL: APTC_LAUNCH(d, aptc_kl_kernel, *(const apti_kl_job *)job, ((const apti_kl_job *)job)->rows, 1); return true;
    case APTI_OP_LAYER_LOSS: aptc_layer_loss_op(d, (const apti_layer_loss *)job); return true;
    case APTI_OP_SQUARES: return aptc_squares_op(d, (const apti_squares_job *)job);
    case APTI_OP_ADAM: return aptc_adam_op(d, (const apti_adam_job *)job);
    case APTI_OP_CUT: return aptc_cut_op(d, (const apti_cut_job *)job);
    case APTI_OP_COUNT: default: return false;
    }
    if (!done) aptc_sizes_add(d, NULL, sum, 0);
    return done;
}

#ifdef APT_CUDA_EMULATE
static void aptc_queue_run(aptc_device *d)
{
    for (int32_t i = 0; i < d->queued; i++) d->queue[i].kernel(d->queue[i].job.bytes, d->queue[i].bx, d->queue[i].by);
    d->queued = 0;
}
#endif

static apt_result aptc_sync(void *self, bool look, char message[APTI_BACKEND_MESSAGE])
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
    d->used = 0;
    aptc_settle(d);
    while (look && d->halves > 0) aptc_half_widen(d, d->halves - 1);
    aptc_issue_all(d);
    d->givens = 0;
    memset(d->kept, 0, sizeof d->kept);           /* the CPU may write next */
#ifdef APT_CUDA_EMULATE
    aptc_queue_run(d);
#else
    aptc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize");
#endif
    const apt_result r = d->result;
    memcpy(message, d->message, sizeof d->message);
    d->result = APT_OK;
    return r;
}

#ifdef APT_CUDA_EMULATE
typedef struct aptc_upload { void *to, *copy; size_t bytes; } aptc_upload;

static void aptc_upload_run(const void *job, int64_t bx, int64_t by)
{
    aptc_upload u;
    (void)bx, (void)by;
    memcpy(&u, job, sizeof u);
    memcpy(u.to, u.copy, u.bytes);
    free(u.copy);
}
#endif

/* Between the launches in front of it and those behind it, and in no graph */
static void aptc_upload_op(void *self, void *to, const void *from, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
    aptc_issue_all(d);
#ifdef APT_CUDA_EMULATE
    aptc_launch l;
    const aptc_upload u = {to, malloc(bytes), bytes};
    memset(&l, 0, sizeof l);
    if (u.copy == NULL) {
        aptc_fail(d, APT_E_MEMORY, "no memory for an upload");
        return;
    }
    memcpy(u.copy, from, bytes);
    memcpy(l.job.bytes, &u, sizeof u);
    l.bytes = sizeof u;
    l.kernel = aptc_upload_run;
    aptc_issue(d, &l);
#else
    aptc_check(d, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, d->stream), "cudaMemcpyAsync");
#endif
}

static void aptc_fetch(void *self, void *to, const void *from, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
    aptc_issue_all(d);
#ifdef APT_CUDA_EMULATE
    aptc_queue_run(d);
    memcpy(to, from, bytes);
#else
    aptc_check(d, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, d->stream), "cudaMemcpyAsync");
    aptc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize");
#endif
}

static void *aptc_managed(size_t bytes)
{
#ifdef APT_CUDA_EMULATE
    return malloc(bytes);
#else
    void *p = NULL;
    if (cudaMallocManaged(&p, bytes, cudaMemAttachGlobal) == cudaSuccess) return p;
    (void)cudaGetLastError();         /* no memory is not a failure of the device */
    return NULL;
#endif
}

/* Pages that are read by both sides have a copy on each. */
static void aptc_advise(const aptc_device *d, const aptc_range *range, bool on)
{
#ifdef APT_CUDA_EMULATE
    (void)d, (void)range, (void)on;
#else
    const cudaMemoryAdvise advice = on ? cudaMemAdviseSetReadMostly : cudaMemAdviseUnsetReadMostly;
#if CUDART_VERSION >= 13000
    cudaMemLocation where = cudaMemLocation();
    where.type = cudaMemLocationTypeDevice;
    where.id = d->device;
#else
    const int where = d->device;
#endif
    (void)cudaMemAdvise((const void *)range->first, range->end - range->first, advice, where);
    (void)cudaGetLastError();
#endif
}

/* Advice alone: what comes of it is no failure. Where there is no managed memory there are no pages to move. */
static void aptc_share(void *self, const void *memory, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    aptc_range *place = aptc_range_at(d->shared, (uintptr_t)memory);
    if (place == NULL || d->desc.alloc != NULL) return;
    if (place->end != 0) aptc_advise(d, place, false);
    place->first = (uintptr_t)memory;
    place->end = bytes > 0 ? (uintptr_t)memory + bytes : 0;
    if (place->end != 0) aptc_advise(d, place, true);
}

static void *aptc_alloc(void *self, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    if (d->desc.alloc != NULL) return d->desc.alloc(bytes, d->desc.alloc_user);
    if (bytes > d->memory_left) return NULL;
    aptc_enter(d);
    void *p = aptc_managed(bytes);
    if (p != NULL) d->memory_left -= bytes;
    return p;
}

static void aptc_release(void *self, void *memory, size_t bytes)
{
    aptc_device *d = (aptc_device *)self;
    aptc_half_forget(d, (uintptr_t)memory, (uintptr_t)memory + bytes);
    aptc_ranges_drop(d->owned, (uintptr_t)memory, (uintptr_t)memory + bytes);
    aptc_ranges_drop(d->shared, (uintptr_t)memory, (uintptr_t)memory + bytes);
    if (d->desc.release != NULL) {
        d->desc.release(memory, d->desc.alloc_user);
        return;
    }
    d->memory_left += bytes;
#ifdef APT_CUDA_EMULATE
    free(memory);
#else
    (void)cudaFree(memory);
#endif
}

/* The workspace: what the caller gives, or memory that only the device can address. */
static void aptc_work_open(aptc_device *d)
{
    const size_t align = 256, scalars = APTC_SCALARS * sizeof(aptc_scalars), bytes = d->work_bytes + scalars + align;
    if (d->desc.alloc != NULL) d->block = d->desc.alloc(bytes, d->desc.alloc_user);
#ifdef APT_CUDA_EMULATE
    else d->block = malloc(bytes);
#else
    else aptc_check(d, cudaMalloc(&d->block, bytes), "cudaMalloc of the workspace");
#endif
    if (d->block == NULL) {
        aptc_fail(d, APT_E_MEMORY, "no memory for the workspace");
        return;
    }
    d->scalars = (aptc_scalars *)((char *)d->block + (align - (uintptr_t)d->block % align) % align);
    d->work = (char *)d->scalars + scalars;
    d->backend.workspace = (int64_t)bytes;
}

/* Half of the workspace is for operands that are kept, if products convert theirs. */
static void aptc_work_split(aptc_device *d)
{
    if (aptc_math_type(d) == APT_F32) return;
    d->kept_bytes = (int64_t)(d->work_bytes / 2 / APTC_KEPT / 256 * 256);
    d->work_bytes -= (size_t)d->kept_bytes * APTC_KEPT;
    d->kept_work = d->work + d->work_bytes;
}

static void aptc_work_close(aptc_device *d)
{
    if (d->block == NULL) return;
    if (d->desc.release != NULL) d->desc.release(d->block, d->desc.alloc_user);
#ifdef APT_CUDA_EMULATE
    else free(d->block);
#else
    else (void)cudaFree(d->block);
#endif
}

static void aptc_close(void *self)
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
    for (int32_t i = 0; i < APTC_GRAPHS; i++) {
        aptc_graph_unmake(&d->graph[i]);
        free(d->graph[i].launch);
    }
#ifdef APT_CUDA_EMULATE
    free(d->queue);
    aptc_work_close(d);
#else
    if (d->stream != NULL) (void)cudaStreamSynchronize(d->stream);
    if (d->blas != NULL) (void)cublasLtDestroy(d->blas);
    aptc_work_close(d);
    if (d->stream != NULL) (void)cudaStreamDestroy(d->stream);
    free(d->algorithms);
#endif
    free(d->record);
    free(d->seen);
    free(d->half);
    free(d);
}

#ifdef APT_CUDA_EMULATE
static void aptc_device_start(aptc_device *d)
{
    d->room = APTC_ROOM_BYTES;
    d->memory_left = SIZE_MAX;
    aptc_work_open(d);
    aptc_work_split(d);
}
#else
static void aptc_device_start(aptc_device *d)
{
    int managed = 0;
    size_t vacant = 0, total = 0;
    d->device = d->desc.device;
    aptc_check(d, cudaSetDevice(d->device), "cudaSetDevice");
    if (d->result != APT_OK) return;
    aptc_check(d, cudaDeviceGetAttribute(&managed, cudaDevAttrConcurrentManagedAccess, d->device), "cudaDeviceGetAttribute");
    if (d->result == APT_OK && !managed)
        aptc_fail(d, APT_E_UNSUPPORTED, "device %d: the CPU cannot read managed memory while it computes", (int)d->device);
    if (d->result != APT_OK) return;
    aptc_check(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    aptc_work_open(d);
    aptc_blas_check(d, cublasLtCreate(&d->blas), "cublasLtCreate");
    d->algorithms = (aptc_algorithm *)calloc(APTC_ALGORITHMS, sizeof(aptc_algorithm));
    if (d->algorithms == NULL) aptc_fail(d, APT_E_MEMORY, "no memory");
    d->blas_bytes = d->work_bytes / 4 / 256 * 256;
    d->work_bytes -= d->blas_bytes;
    d->blas_work = d->work + d->work_bytes;
    aptc_work_split(d);
    aptc_check(d, cudaMemGetInfo(&vacant, &total), "cudaMemGetInfo");
    d->memory_left = vacant - vacant / 32;        /* graphs and the code of kernels lie on the device, too */
    void (*const attention[])(aptc_attention) = {
        aptc_attention_forward_kernel, aptc_attention_dq_kernel, aptc_attention_sweep_kernel, aptc_attention_dkv_kernel,
        aptc_attention_dbias_kernel, aptc_flash_forward_32, aptc_flash_forward_64, aptc_flash_forward_128,
        aptc_flash_dq_32, aptc_flash_dq_64, aptc_flash_dq_128, aptc_flash_dkv_32, aptc_flash_dkv_64, aptc_flash_dkv_128};
    int room = 0;
    aptc_check(d, cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, d->device), "cudaDeviceGetAttribute");
    for (size_t i = 0; i < sizeof attention / sizeof *attention; i++)
        aptc_check(d, cudaFuncSetAttribute(attention[i], cudaFuncAttributeMaxDynamicSharedMemorySize, room), "attention");
    d->room = room;
}
#endif

static apt_backend *aptc_refuse(char *message, size_t capacity, const char *text)
{
    if (message != NULL && capacity > 0) (void)snprintf(message, capacity, "%s", text);
    return NULL;
}

apt_backend *apt_cuda_open(const apt_cuda_desc *given, char *message, size_t capacity)
{
    apt_cuda_desc desc;
    memset(&desc, 0, sizeof desc);
    if (given != NULL) desc = *given;
    if (desc.start_canary != 0 || desc.end_canary != 0)
        return aptc_refuse(message, capacity, "apt_cuda_desc was not initialised: start with apt_cuda_desc desc = APT_ZERO");
    if (desc.math != APT_CUDA_FP32 && desc.math != APT_CUDA_TF32 && desc.math != APT_CUDA_BF16 && desc.math != APT_CUDA_FP16)
        return aptc_refuse(message, capacity, "apt_cuda_desc.math is not known; supported: APT_CUDA_FP32, APT_CUDA_TF32, "
                           "APT_CUDA_BF16, APT_CUDA_FP16");
    if ((desc.alloc == NULL) != (desc.release == NULL))
        return aptc_refuse(message, capacity, "apt_cuda_desc.alloc and .release: both or none");
    if (desc.workspace_bytes == 0) desc.workspace_bytes = (size_t)128 << 20;
    if (desc.workspace_bytes < (size_t)8 << 20)
        return aptc_refuse(message, capacity, "apt_cuda_desc.workspace_bytes is below 8 MiB");
    aptc_device *d = (aptc_device *)calloc(1, sizeof(aptc_device));
    if (d == NULL) return aptc_refuse(message, capacity, "no memory");
    d->desc = desc;
    d->math = desc.math;
    d->work_bytes = desc.workspace_bytes / 256 * 256;
    d->record = (aptc_launch *)malloc(APTC_GRAPH_MAX * sizeof(aptc_launch));
    d->seen = (uint64_t *)calloc(APTC_SEEN_SETS * APTC_SEEN_WAYS, sizeof(uint64_t));
    if (d->record == NULL || d->seen == NULL) aptc_fail(d, APT_E_MEMORY, "no memory");
    else aptc_device_start(d);
    if (desc.memory_bytes > 0 && desc.memory_bytes < d->memory_left) d->memory_left = desc.memory_bytes;
    if (d->result != APT_OK) {
        (void)aptc_refuse(message, capacity, d->message);
        aptc_close(d);
        return NULL;
    }
    d->backend.name = "cuda";
    d->backend.loss_scale = d->math == APT_CUDA_FP16 ? 65536.0f : 0.0f;
    d->backend.self = d;
    d->backend.alloc = aptc_alloc;
    d->backend.release = aptc_release;
    d->backend.run = aptc_run;
    d->backend.own = aptc_own;
    d->backend.forget = aptc_forget;
    d->backend.upload = aptc_upload_op;
    d->backend.share = aptc_share;
    d->backend.fetch = aptc_fetch;
    d->backend.sync = aptc_sync;
    d->backend.close = aptc_close;
    return &d->backend;
}
#endif /* APT_CUDA_IMPLEMENTATION */
