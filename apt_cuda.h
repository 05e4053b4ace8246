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

/* What products compute in. Everything else is float32 in every mode, and so are sums. */
typedef enum apt_cuda_math {
    APT_CUDA_FP32 = 0,                /* float32: as on the CPU but for the order of sums */
    APT_CUDA_TF32,                    /* operands of products rounded to 10 bits behind the point */
    APT_CUDA_BF16,                    /* operands of products rounded to bfloat16 */
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
   APTC_WARP_SUM(x)          x of every thread = the sum of x over its warp, in a fixed order; likewise APTC_WARP_MAX
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

APTC_BOTH float aptc_load(const void *data, apt_dtype type, int64_t i)
{
    if (type == APT_F32) return ((const float *)data)[i];
    const uint16_t half = ((const uint16_t *)data)[i];
    return type == APT_BF16 ? aptc_bf16_to_f32(half) : aptc_f16_to_f32(half);
}

APTC_BOTH void aptc_store(void *data, apt_dtype type, int64_t i, float value)
{
    if (type == APT_F32) ((float *)data)[i] = value;
    else ((uint16_t *)data)[i] = type == APT_BF16 ? aptc_f32_to_bf16(value) : aptc_f32_to_f16(value);
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

/* What follows a product: pre = z;  c = (act(z) + residual) * mask. z may be c, pre or residual. The sizes are c's: see
   APTC_EACH_SIZED. */
typedef struct aptc_finish {
    float *c, *pre, *sizes;
    const float *z, *residual, *mask;
    int64_t ldc, ld_pre, ldz, ld_residual, rows, n, act;
} aptc_finish;

/* What waits for the operation behind it, see aptc_settle */
typedef enum aptc_waits {
    APTC_NOTHING = 0, APTC_FINISH, APTC_GATE, APTC_ACT, APTC_RESIDUAL, APTC_NORM, APTC_ATTENTION, APTC_SUM
} aptc_waits;

/* x(rows, n) with a row stride */
typedef struct aptc_matrix { const float *x; int64_t ld, rows, n; } aptc_matrix;

typedef struct aptc_attention {
    aptc_view q, k, v, o, d_o, dq, dk, dv;        /* dq, dk, dv: data NULL, not wanted */
    const float *lse, *bias, *mask, *dot;
    float *lse_out, *dot_out, *dbias;             /* dbias: (sequences, heads, 2*span - 1) */
    float *sizes, *sums;              /* (sequences * blocks, heads * dim) or NULL: of |o| (backward: |d_o|) and o in a block */
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
        apti_gate_job gate;
        apti_act_job act;
        apti_residual_job residual;
        apti_norm_job norm;
        aptc_attention attention;
        apti_column_job sum;
    } waiting;
    aptc_matrix written;              /* what it will write; x NULL: nothing that it could add up */
    apti_column_job asked[2];         /* sums of |x| and of x, of what it writes; acc NULL: not asked for */
    aptc_kept kept[APTC_KEPT];
    char *kept_work;                  /* APTC_KEPT places of kept_bytes */
    int64_t kept_bytes;
    int32_t kept_next;                /* the place for the next one */
    aptc_scalars *scalars;            /* [APTC_SCALARS], the device's */
    aptc_scalars given[APTC_SCALARS]; /* what they hold when the queue is done, `givens` of them */
    int32_t givens;
#ifdef APT_CUDA_EMULATE
    aptc_launch *queue;
    int32_t queued, capacity;
    int64_t launched, replayed;       /* launches so far; those that were part of a graph */
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

/* Matrices that are read and written element by element: a thread per column and, of the rows, every APTC_ROWS-th. Blocks of one
   row each would be over before they have begun. */
enum { APTC_EACH_BLOCKS = 4096 };

static int64_t aptc_columns(int64_t n) { return aptc_ceil(n, APTC_BLOCK); }

static int64_t aptc_row_blocks(int64_t rows, int64_t n)
{
    return n < 1 ? 0 : aptc_min(rows, aptc_max(1, APTC_EACH_BLOCKS / aptc_columns(n)));
}

#define APTC_EACH(job_rows, job_n)                                                                                      \
    for (int64_t i = APTC_BY; i < (job_rows); i += APTC_ROWS)                                                           \
        APTC_THREADS(t)                                                                                                 \
            for (int64_t j = APTC_BX * APTC_BLOCK + t, aptc_last = 0; j < (job_n) && aptc_last == 0; aptc_last = 1)
#define APTC_LAUNCH_ROWS(d, name, job, rows, n) APTC_LAUNCH(d, name, job, aptc_columns(n), aptc_row_blocks(rows, n))
#define APTC_LAUNCH_EACH(d, name, job) APTC_LAUNCH_ROWS(d, name, job, (job).rows, (job).n)

/* The same for kernels that can also add up what salience asks for: sizes(APTC_ROWS, n), the sums of |x| over the rows of each
   block; NULL: none. APTC_SIZE(x) is to be the last there. */
#define APTC_EACH_SIZED(job_rows, job_n)                                                                                \
    APTC_PRIVATE(float, total);                                                                                         \
    APTC_THREADS(t) APTC_MINE(total, t) = 0;                                                                            \
    APTC_EACH(job_rows, job_n)
#define APTC_SIZE(x) APTC_MINE(total, t) += fabsf(x)
#define APTC_SIZES_END(job_n)                                                                                           \
    APTC_THREADS(t) {                                                                                                   \
        const int64_t j = APTC_BX * APTC_BLOCK + t;                                                                     \
        if (job.sizes != NULL && j < (job_n)) job.sizes[APTC_BY * (job_n) + j] = APTC_MINE(total, t);                   \
    }

APTC_KERNEL(aptc_finish_kernel, aptc_finish)
{
    APTC_EACH_SIZED(job.rows, job.n) {
        float x = job.z[i * job.ldz + j], slope;
        if (job.pre != NULL && job.pre != job.z) job.pre[i * job.ld_pre + j] = x;
        x = aptc_act(x, (int32_t)job.act, &slope);
        if (job.residual != NULL) x += job.residual[i * job.ld_residual + j];
        if (job.mask != NULL) x *= job.mask[j];
        job.c[i * job.ldc + j] = x;
        APTC_SIZE(x);
    }
    APTC_SIZES_END(job.n)
}
APTC_LAUNCHER(aptc_finish_kernel, aptc_finish)

/* to(rows, n) = from in another type; of a transposed `from` (rows are its columns) as well */
typedef struct aptc_cast {
    void *to;
    const void *from;
    int64_t ld_to, ld_from, rows, n;
    apt_dtype to_type, from_type;
} aptc_cast;

APTC_KERNEL(aptc_cast_kernel, aptc_cast)
{
    APTC_EACH(job.rows, job.n)
        aptc_store(job.to, job.to_type, i * job.ld_to + j, aptc_load(job.from, job.from_type, i * job.ld_from + j));
}
APTC_LAUNCHER(aptc_cast_kernel, aptc_cast)

APTC_KERNEL(aptc_copy_kernel, apti_copy_job)
{
    APTC_EACH(job.rows, job.n) job.y[i * job.ldy + j] = job.x != NULL ? job.x[i * job.ldx + j] : 0.0f;
}
APTC_LAUNCHER(aptc_copy_kernel, apti_copy_job)

/* The sizes are da's or, if written, du's. */
typedef struct aptc_act_backward { apti_act_job op; float *sizes; int64_t written; } aptc_act_backward;

APTC_KERNEL(aptc_act_backward_kernel, aptc_act_backward)
{
    APTC_EACH_SIZED(job.op.rows, job.op.n) {
        const float da = job.op.da[i * job.op.ldda + j];
        float slope = 1;
        if (job.op.act >= 0) (void)aptc_act(job.op.pre[i * job.op.ld_pre + j], job.op.act, &slope);
        const float du = da * slope * (job.op.mask != NULL ? job.op.mask[j] : 1.0f);
        job.op.du[i * job.op.lddu + j] = du;
        APTC_SIZE(job.written ? du : da);
    }
    APTC_SIZES_END(job.op.n)
}
APTC_LAUNCHER(aptc_act_backward_kernel, aptc_act_backward)

/* The sizes are x's or, if written, y's. */
typedef struct aptc_residual { apti_residual_job op; float *sizes; int64_t written; } aptc_residual;

APTC_KERNEL(aptc_residual_kernel, aptc_residual)
{
    APTC_EACH_SIZED(job.op.rows, job.op.n) {
        const float x = job.op.x[i * job.op.ldx + j], sum = x + job.op.r[i * job.op.ldr + j];
        const float y = job.op.mask != NULL ? sum * job.op.mask[j] : sum;
        job.op.y[i * job.op.ldy + j] = y;
        APTC_SIZE(job.written ? y : x);
    }
    APTC_SIZES_END(job.op.n)
}
APTC_LAUNCHER(aptc_residual_kernel, aptc_residual)

/* The sizes are those of h, backward of dh. */
typedef struct aptc_gate { apti_gate_job op; float *sizes; } aptc_gate;

APTC_KERNEL(aptc_gate_forward_kernel, aptc_gate)
{
    APTC_EACH_SIZED(job.op.rows, job.op.n) {
        float x = job.op.a[i * job.op.lda + j] * job.op.v[i * job.op.ldv + j];
        if (job.op.mask != NULL) x *= job.op.mask[j];
        job.op.h[i * job.op.ldh + j] = x;
        APTC_SIZE(x);
    }
    APTC_SIZES_END(job.op.n)
}
APTC_LAUNCHER(aptc_gate_forward_kernel, aptc_gate)

APTC_KERNEL(aptc_gate_backward_kernel, aptc_gate)
{
    APTC_EACH_SIZED(job.op.rows, job.op.n) {
        float slope;
        const float act = aptc_act(job.op.u[i * job.op.ldu + j], job.op.act, &slope), given = job.op.dh[i * job.op.lddh + j];
        const float dh = given * (job.op.mask != NULL ? job.op.mask[j] : 1.0f), v = job.op.v[i * job.op.ldv + j];
        job.op.dv[i * job.op.lddv + j] = dh * act;
        job.op.du[i * job.op.lddu + j] = dh * v * slope;
        APTC_SIZE(given);
    }
    APTC_SIZES_END(job.op.n)
}
APTC_LAUNCHER(aptc_gate_backward_kernel, aptc_gate)

APTC_KERNEL(aptc_tanh_forward_kernel, apti_tanh_job)
{
    APTC_EACH(job.rows, job.n) job.out[i * job.ld + j] = tanhf(job.x[i * job.ld + j]);
}
APTC_LAUNCHER(aptc_tanh_forward_kernel, apti_tanh_job)

APTC_KERNEL(aptc_tanh_backward_kernel, apti_tanh_job)
{
    APTC_EACH(job.rows, job.n) {
        const float y = job.x[i * job.ld + j];
        job.out[i * job.ld + j] = job.dy[i * job.ld + j] * (1.0f - y * y);
    }
}
APTC_LAUNCHER(aptc_tanh_backward_kernel, apti_tanh_job)

/* Long vectors: a thread per element of each round. */
enum { APTC_VECTOR_BLOCKS = 1024 };
#define APTC_VECTOR(count)                                                                                              \
    APTC_THREADS(t) for (int64_t i = APTC_BX * APTC_BLOCK + t; i < (count); i += (int64_t)APTC_VECTOR_BLOCKS * APTC_BLOCK)
#define APTC_LAUNCH_VECTOR(d, name, job, count) \
    APTC_LAUNCH(d, name, job, aptc_min(aptc_ceil(count, APTC_BLOCK), APTC_VECTOR_BLOCKS), 1)

APTC_KERNEL(aptc_scale_kernel, apti_scale_job)
{
    APTC_VECTOR(job.n) job.x[i] *= job.s;
}
APTC_LAUNCHER(aptc_scale_kernel, apti_scale_job)

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
    APTC_CHUNK_COLUMNS = 32, APTC_CHUNK_LANES = APTC_BLOCK / APTC_CHUNK_COLUMNS, APTC_CHUNKS = 128, APTC_CHUNK_ROWS = 64,
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

/* partial(chunks, n): sums over a chunk of rows of x, |x|, x^2, or of a norm's dy * (z - mean) * rstd */
typedef struct aptc_column {
    float *partial;
    const float *x, *z, *stats;       /* z NULL: plain sums */
    int64_t ldx, ldz, rows, n, chunk;
    apti_column_kind kind;
} aptc_column;

APTC_DEVICE float aptc_column_term(const aptc_column *job, int64_t i, int64_t j)
{
    const float x = job->x[i * job->ldx + j];
    if (job->z != NULL) return x * (job->z[i * job->ldz + j] - job->stats[2 * i]) * job->stats[2 * i + 1];
    return job->kind == APTI_COLUMN_ABS ? fabsf(x) : job->kind == APTI_COLUMN_SQUARE ? x * x : x;
}

/* Block: APTC_CHUNK_COLUMNS columns (BX) of a chunk (BY); APTC_CHUNK_LANES threads share a column */
APTC_KERNEL(aptc_column_kernel, aptc_column)
{
    APTC_SHARED(float, sum, APTC_BLOCK);
    APTC_THREADS(t) {
        const int64_t j = APTC_BX * APTC_CHUNK_COLUMNS + t % APTC_CHUNK_COLUMNS, first = APTC_BY * job.chunk;
        const int64_t end = aptc_min(job.rows, first + job.chunk);
        float total = 0;
        for (int64_t i = first + t / APTC_CHUNK_COLUMNS; j < job.n && i < end; i += APTC_CHUNK_LANES)
            total += aptc_column_term(&job, i, j);
        sum[t] = total;
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const int64_t j = APTC_BX * APTC_CHUNK_COLUMNS + t;
        float total = 0;
        for (int32_t lane = 0; t < APTC_CHUNK_COLUMNS && lane < APTC_CHUNK_LANES; lane++)
            total += sum[lane * APTC_CHUNK_COLUMNS + t];
        if (t < APTC_CHUNK_COLUMNS && j < job.n) job.partial[APTC_BY * job.n + j] = total;
    }
}
APTC_LAUNCHER(aptc_column_kernel, aptc_column)

/* acc(n) += mask * column sums; false: the workspace is too small */
static bool aptc_column_run(aptc_device *d, float *acc, aptc_column *job, const float *mask, bool binary)
{
    job->chunk = aptc_max(APTC_CHUNK_ROWS, aptc_ceil(job->rows, APTC_CHUNKS));
    const int64_t chunks = aptc_ceil(job->rows, job->chunk);
    job->partial = (float *)aptc_take(d, chunks * job->n * (int64_t)sizeof(float));
    if (job->partial == NULL) return false;
    const aptc_fold fold = {acc, job->partial, mask, chunks, job->n, job->n, binary};
    APTC_LAUNCH(d, aptc_column_kernel, *job, aptc_ceil(job->n, APTC_CHUNK_COLUMNS), chunks);
    APTC_LAUNCH_FOLD(d, fold);
    return true;
}

static bool aptc_column_op(aptc_device *d, const apti_column_job *op)
{
    aptc_column job;
    memset(&job, 0, sizeof job);
    job.x = op->x;
    job.ldx = op->ldx;
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

static void aptc_gate_run(aptc_device *d, const apti_gate_job *op, bool backward, const apti_column_job *sum)
{
    const int64_t blocks = aptc_row_blocks(op->rows, op->n);
    const aptc_gate g = {*op, aptc_sizes_for(d, sum, blocks)};
    if (backward) APTC_LAUNCH_ROWS(d, aptc_gate_backward_kernel, g, op->rows, op->n);
    else APTC_LAUNCH_ROWS(d, aptc_gate_forward_kernel, g, op->rows, op->n);
    aptc_sizes_add(d, g.sizes, sum, blocks);
}

static void aptc_gate_forward_op(aptc_device *d, const apti_gate_job *op)
{
    d->waiting.gate = *op;
    aptc_wait(d, APTC_GATE, op->h, op->ldh, op->rows, op->n);
}

static void aptc_act_backward_run(aptc_device *d, const apti_act_job *op, const apti_column_job *sum, bool written)
{
    const int64_t blocks = aptc_row_blocks(op->rows, op->n);
    const aptc_act_backward a = {*op, aptc_sizes_for(d, sum, blocks), written};
    APTC_LAUNCH_ROWS(d, aptc_act_backward_kernel, a, op->rows, op->n);
    aptc_sizes_add(d, a.sizes, sum, blocks);
}

/* sum: of what it reads; without one it waits for one of what it writes. */
static void aptc_act_backward_op(aptc_device *d, const apti_act_job *op, const apti_column_job *sum)
{
    if (sum != NULL) {
        aptc_act_backward_run(d, op, sum, false);
        return;
    }
    d->waiting.act = *op;
    aptc_wait(d, APTC_ACT, op->du, op->lddu, op->rows, op->n);
}

static void aptc_residual_run(aptc_device *d, const apti_residual_job *op, const apti_column_job *sum, bool written)
{
    const int64_t blocks = aptc_row_blocks(op->rows, op->n);
    const aptc_residual r = {*op, aptc_sizes_for(d, sum, blocks), written};
    APTC_LAUNCH_ROWS(d, aptc_residual_kernel, r, op->rows, op->n);
    aptc_sizes_add(d, r.sizes, sum, blocks);
}

/* As aptc_act_backward_op */
static void aptc_residual_op(aptc_device *d, const apti_residual_job *op, const apti_column_job *sum)
{
    if (sum != NULL) {
        aptc_residual_run(d, op, sum, false);
        return;
    }
    d->waiting.residual = *op;
    aptc_wait(d, APTC_RESIDUAL, op->y, op->ldy, op->rows, op->n);
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

/* The sizes, (APTC_ROWS, d) or NULL, are y's, backward dy's. */
typedef struct aptc_norm { apti_norm_job op; float *sizes; } aptc_norm;

/* first, first + APTC_WARPS, ...: the first rows of a block's rounds */
#define APTC_NORM_ROUNDS(first) \
    for (int64_t first = APTC_BY * APTC_WARPS; first < job.op.rows; first += APTC_ROWS * APTC_WARPS)

/* Thread t's share of the block's sums of |x(rows, d)| over the rows of a round: columns t, t + APTC_BLOCK, ... */
APTC_DEVICE void aptc_norm_sizes(const apti_norm_job *op, float *sizes, const float *x, int64_t ld, int64_t first, bool begins,
                                 int32_t t)
{
    const int64_t end = aptc_min(op->rows, first + APTC_WARPS);
    for (int64_t j = t; j < op->d; j += APTC_BLOCK) {
        float total = begins ? 0.0f : sizes[j];
        for (int64_t i = first; i < end; i++) total += fabsf(x[i * ld + j]);
        sizes[j] = total;
    }
}

#define APTC_NORM_SIZES(x, ld, first)                                                                                   \
    APTC_THREADS(t) aptc_norm_sizes(&job.op, job.sizes + APTC_BY * job.op.d, x, ld, first, first == APTC_BY * APTC_WARPS, t)

APTC_DEVICE bool aptc_alive(const float *mask, int64_t j) { return mask == NULL || mask[j] != 0.0f; }

/* A round of rows from `first` on */
APTC_DEVICE void aptc_norm_forward_rows(const apti_norm_job *op, int64_t first)
{
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(float, count);
    APTC_PRIVATE(float, mean);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        APTC_MINE(sum, t) = APTC_MINE(count, t) = 0;
        for (int64_t j = t % APTC_WARP; row < op->rows && j < op->d; j += APTC_WARP) {
            if (!aptc_alive(op->mask, j)) continue;
            APTC_MINE(sum, t) += op->z[row * op->ldz + j];
            APTC_MINE(count, t) += 1;
        }
    }
    APTC_WARP_SUM(sum);
    APTC_WARP_SUM(count);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        APTC_MINE(mean, t) = op->rms || APTC_MINE(count, t) == 0 ? 0.0f : APTC_MINE(sum, t) / APTC_MINE(count, t);
        APTC_MINE(sum, t) = 0;
        for (int64_t j = t % APTC_WARP; row < op->rows && j < op->d; j += APTC_WARP) {
            const float x = op->z[row * op->ldz + j] - APTC_MINE(mean, t);
            if (aptc_alive(op->mask, j)) APTC_MINE(sum, t) += x * x;
        }
    }
    APTC_WARP_SUM(sum);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        const float variance = APTC_MINE(count, t) == 0 ? 0.0f : APTC_MINE(sum, t) / APTC_MINE(count, t) + op->eps;
        const float rstd = variance == 0 ? 0.0f : 1.0f / sqrtf(variance), mu = APTC_MINE(mean, t);
        for (int64_t j = t % APTC_WARP; row < op->rows && j < op->d; j += APTC_WARP) {
            float m = op->mask != NULL ? op->mask[j] : 1.0f;
            if (op->rms && m != 0) m = 1;
            const float beta = op->beta != NULL ? op->beta[j] : 0.0f;
            op->y[row * op->ldy + j] = op->gamma[j] * m * ((op->z[row * op->ldz + j] - mu) * rstd) + beta * m;
        }
        if (op->stats != NULL && row < op->rows && t % APTC_WARP == 0) {
            op->stats[2 * row] = mu;
            op->stats[2 * row + 1] = rstd;
        }
    }
}

APTC_KERNEL(aptc_norm_forward_kernel, aptc_norm)
{
    APTC_NORM_ROUNDS(first) {
        aptc_norm_forward_rows(&job.op, first);
        if (job.sizes == NULL) continue;
        APTC_BARRIER;
        APTC_NORM_SIZES(job.op.y, job.op.ldy, first);
    }
}
APTC_LAUNCHER(aptc_norm_forward_kernel, aptc_norm)

/* gamma times what the forward has put on it */
APTC_DEVICE float aptc_norm_gamma(const apti_norm_job *job, int64_t j)
{
    if (job->mask == NULL) return job->gamma[j];
    if (job->rms) return job->mask[j] != 0.0f ? job->gamma[j] : 0.0f;
    return job->gamma[j] * job->mask[j];
}

APTC_DEVICE void aptc_norm_backward_rows(const apti_norm_job *op, int64_t first)
{
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(float, dot);
    APTC_PRIVATE(float, count);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        APTC_MINE(sum, t) = APTC_MINE(dot, t) = APTC_MINE(count, t) = 0;
        for (int64_t j = t % APTC_WARP; row < op->rows && j < op->d; j += APTC_WARP) {
            if (!aptc_alive(op->mask, j)) continue;
            const float x = (op->z[row * op->ldz + j] - op->saved[2 * row]) * op->saved[2 * row + 1];
            const float g = op->dy[row * op->lddy + j] * aptc_norm_gamma(op, j);
            APTC_MINE(sum, t) += g;
            APTC_MINE(dot, t) += g * x;
            APTC_MINE(count, t) += 1;
        }
    }
    APTC_WARP_SUM(sum);
    APTC_WARP_SUM(dot);
    APTC_WARP_SUM(count);
    APTC_THREADS(t) {
        const int64_t row = first + t / APTC_WARP;
        const float n = APTC_MINE(count, t) > 1 ? APTC_MINE(count, t) : 1.0f;
        const float average = op->rms ? 0.0f : APTC_MINE(sum, t) / n, slope = APTC_MINE(dot, t) / n;
        for (int64_t j = t % APTC_WARP; row < op->rows && j < op->d; j += APTC_WARP) {
            const float rstd = op->saved[2 * row + 1], x = (op->z[row * op->ldz + j] - op->saved[2 * row]) * rstd;
            const float g = op->dy[row * op->lddy + j] * aptc_norm_gamma(op, j);
            op->y[row * op->ldy + j] = aptc_alive(op->mask, j) ? rstd * (g - average - x * slope) : 0.0f;
        }
    }
}

APTC_KERNEL(aptc_norm_backward_kernel, aptc_norm)
{
    APTC_NORM_ROUNDS(first) {
        if (job.sizes != NULL) {
            APTC_NORM_SIZES(job.op.dy, job.op.lddy, first);
            APTC_BARRIER;                         /* dz may be dy */
        }
        aptc_norm_backward_rows(&job.op, first);
    }
}
APTC_LAUNCHER(aptc_norm_backward_kernel, aptc_norm)

static void aptc_norm_run(aptc_device *d, const apti_norm_job *op, bool backward, const apti_column_job *sum)
{
    const int64_t blocks = aptc_min(aptc_ceil(op->rows, APTC_WARPS), APTC_NORM_BLOCKS);
    const aptc_norm n = {*op, aptc_sizes_for(d, sum, blocks)};
    if (backward) APTC_LAUNCH(d, aptc_norm_backward_kernel, n, 1, blocks);
    else APTC_LAUNCH(d, aptc_norm_forward_kernel, n, 1, blocks);
    aptc_sizes_add(d, n.sizes, sum, blocks);
}

static void aptc_norm_forward_op(aptc_device *d, const apti_norm_job *op)
{
    d->waiting.norm = *op;
    aptc_wait(d, APTC_NORM, op->y, op->ldy, op->rows, op->d);
}

/* dgamma and dbeta first: dz may be dy. They use the same room in turn, so that it is enough for both or for none. */
static bool aptc_norm_backward_op(aptc_device *d, const apti_norm_job *op, const apti_column_job *sum)
{
    const size_t used = d->used;
    aptc_column job;
    memset(&job, 0, sizeof job);
    job.x = op->dy;
    job.ldx = op->lddy;
    job.rows = op->rows;
    job.n = op->d;
    if (op->dbeta != NULL && !aptc_column_run(d, op->dbeta, &job, op->mask, false)) return false;
    job.z = op->z;
    job.ldz = op->ldz;
    job.stats = op->saved;
    d->used = used;
    if (op->dgamma != NULL && !aptc_column_run(d, op->dgamma, &job, op->mask, op->rms)) return false;
    if (op->y != NULL) aptc_norm_run(d, op, true, sum);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Positions
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct aptc_rotary {
    float *x, *table;
    const float *angles, *frequency;
    const int32_t *positions;
    int64_t ldx, rows, n;             /* n: pairs of a row */
    int32_t half, interleaved;
    float direction;
} aptc_rotary;

APTC_KERNEL(aptc_rotary_table_kernel, aptc_rotary)
{
    APTC_EACH(job.rows, job.n) {
        const float angle = (float)job.positions[i] * job.frequency[j];
        job.table[2 * i * job.half + j] = cosf(angle);
        job.table[(2 * i + 1) * job.half + j] = sinf(angle);
    }
}
APTC_LAUNCHER(aptc_rotary_table_kernel, aptc_rotary)

APTC_KERNEL(aptc_rotary_kernel, aptc_rotary)
{
    APTC_EACH(job.rows, job.n) {
        const int64_t head = j / job.half, k = j % job.half;
        const int64_t step = job.interleaved ? 2 : 1, partner = job.interleaved ? 1 : job.half;
        float *x = job.x + i * job.ldx + head * 2 * job.half + k * step;
        const float co = job.angles[2 * i * job.half + k], si = job.direction * job.angles[(2 * i + 1) * job.half + k];
        const float a = x[0], b = x[partner];
        x[0] = a * co - b * si;
        x[partner] = b * co + a * si;
    }
}
APTC_LAUNCHER(aptc_rotary_kernel, aptc_rotary)

static bool aptc_rotary_op(aptc_device *d, const apti_rotary_job *op, bool table)
{
    aptc_rotary job;
    memset(&job, 0, sizeof job);
    job.x = op->x;
    job.table = op->table;
    job.angles = op->op->table;
    job.frequency = op->frequency;
    job.positions = op->positions;
    job.ldx = op->ldx;
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
    APTC_EACH(job.rows, job.n)
        job.out[i * job.wide + j] = job.in[job.bucket[j] * job.table_heads + (job.column != NULL ? job.column[i] : i)];
}
APTC_LAUNCHER(aptc_relative_forward_kernel, aptc_relative)

/* Rows: heads; columns: buckets, each of which takes its distances in order */
APTC_KERNEL(aptc_relative_backward_kernel, aptc_relative)
{
    APTC_EACH(job.rows, job.n) {
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

APTC_KERNEL(aptc_embed_kernel, apti_embed_job)
{
    APTC_EACH(job.rows, job.d) {
        float x = 0;
        for (int32_t k = 0; k < 3; k++) {
            if (job.table[k].data == NULL) continue;
            const int64_t id = job.table[k].id != NULL ? job.table[k].id[i] : 0;
            const int64_t column = job.table[k].columns != NULL ? job.table[k].columns[j] : j;
            x += aptc_load(job.table[k].data, job.table[k].type, id * job.table[k].stride + column);
        }
        job.x[i * job.ldx + j] = x;
    }
}
APTC_LAUNCHER(aptc_embed_kernel, apti_embed_job)

static bool aptc_embed_op(aptc_device *d, const apti_embed_job *op)
{
    for (int32_t k = 0; k < 3; k++)
        if (op->table[k].data != NULL && op->table[k].nr != 1) return false;
    APTC_LAUNCH_ROWS(d, aptc_embed_kernel, *op, op->rows, op->d);
    return true;
}

APTC_KERNEL(aptc_gather_kernel, apti_rows_job)
{
    APTC_EACH(job.rows, job.d) job.x[i * job.ldx + j] = job.from[job.index[i] * job.ld_from + j];
}
APTC_LAUNCHER(aptc_gather_kernel, apti_rows_job)

static bool aptc_gather_op(aptc_device *d, const apti_rows_job *op)
{
    APTC_LAUNCH_ROWS(d, aptc_gather_kernel, *op, op->rows, op->d);
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
    APTC_EACH(job.rows, job.n) {
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
    float *x;
    const float *from;
    const int32_t *index;
    int64_t ldx, ld_from, rows, zero_rows, targets, n;
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
                    APTC_MINE(sum, t) += job.from[(first + i) * job.ld_from + j];
                    APTC_MINE(hits, t)++;
                }
            }
        }
        APTC_THREADS(t) {
            const int64_t j = APTC_BX * APTC_BLOCK + t;
            float *x = job.x + target * job.ldx + j;
            if (j < job.n && target < job.zero_rows) *x = APTC_MINE(sum, t);
            else if (j < job.n && APTC_MINE(hits, t) > 0) *x += APTC_MINE(sum, t);
        }
        APTC_BARRIER;
    }
}
APTC_LAUNCHER(aptc_scatter_kernel, aptc_scatter)

/* Names that differ: each row has a place of its own. */
APTC_KERNEL(aptc_place_kernel, apti_rows_job)
{
    APTC_EACH(job.rows, job.d) job.x[job.index[i] * job.ldx + j] += job.from[i * job.ld_from + j];
}
APTC_LAUNCHER(aptc_place_kernel, apti_rows_job)

static bool aptc_scatter_op(aptc_device *d, const apti_rows_job *op)
{
    if (op->unique) {
        const apti_copy_job zero = {op->x, NULL, op->ldx, 0, op->zero_rows, op->d};
        if (op->zero_rows > 0) APTC_LAUNCH_EACH(d, aptc_copy_kernel, zero);
        if (op->rows > 0) APTC_LAUNCH_ROWS(d, aptc_place_kernel, *op, op->rows, op->d);
        return true;
    }
    aptc_scatter job;
    memset(&job, 0, sizeof job);
    job.x = op->x;
    job.from = op->from;
    job.index = op->index;
    job.ldx = op->ldx;
    job.ld_from = op->ld_from;
    job.rows = op->rows;
    job.zero_rows = op->zero_rows;
    job.n = op->d;
    job.targets = op->targets;
    APTC_LAUNCH(d, aptc_scatter_kernel, job, aptc_columns(op->d), aptc_min(op->targets, APTC_GRID_ROWS));
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

APTC_KERNEL(aptc_layer_loss_kernel, apti_layer_loss)
{
    APTC_SHARED(double, term, APTC_BLOCK);
    APTC_SHARED(double, square, APTC_BLOCK);
    const int64_t row = APTC_BX;
    float *m = job.mapped + row * job.ld_mapped, *dy = job.dy + row * job.ld;
    const float *h = job.h + row * job.ld, *y = job.teacher + row * job.dt;
    APTC_THREADS(t) {
        for (int64_t i = t; i < job.d; i += APTC_BLOCK) m[job.place[i]] += h[i];                  /* no two i have one place */
        square[t] = 0;
        for (int64_t i = t; i < job.dt; i += APTC_BLOCK) square[t] += (double)y[i] * (double)y[i];
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        double total = 0;
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += square[k];
        if (t == 0) square[0] = job.relative ? total > 0 ? (double)job.dt / total : 0.0 : 1.0;    /* u */
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const float scale = (float)((double)job.coefficient * square[0]);
        term[t] = 0;
        for (int64_t i = t; i < job.dt; i += APTC_BLOCK) {
            const float e = m[i] - y[i];
            term[t] += (double)e * (double)e;
            m[i] = e * scale;
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        double total = 0;
        for (int64_t i = t; i < job.d; i += APTC_BLOCK) dy[i] += m[job.place[i]];
        for (int32_t k = 0; t == 0 && k < APTC_BLOCK; k++) total += term[k];
        if (t == 0) job.row_sum[row] = square[0] * total;
    }
}
APTC_LAUNCHER(aptc_layer_loss_kernel, apti_layer_loss)

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
static float aptc_half(apt_dtype type, uint32_t bits)
{
    return type == APT_BF16 ? aptc_bf16_to_f32((uint16_t)bits) : aptc_f16_to_f32((uint16_t)bits);
}

static uint32_t aptc_pack(apt_dtype type, float x, float y)
{
    if (type == APT_BF16) return (uint32_t)aptc_f32_to_bf16(x) | (uint32_t)aptc_f32_to_bf16(y) << 16;
    return (uint32_t)aptc_f32_to_f16(x) | (uint32_t)aptc_f32_to_f16(y) << 16;
}

static void aptc_read16(uint32_t *to, const void *from) { memcpy(to, from, 16); }
static void aptc_write16(void *to, const uint32_t *from) { memcpy(to, from, 16); }
static void aptc_copy_async(void *to, const void *from) { memcpy(to, from, 16); }
#define APTC_COPIES_END ((void)0)
#define APTC_COPIES_WAIT(n) ((void)0)

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
                    left[g + r % 2 * 8][2 * c + r / 2 * 8 + h] = aptc_half(type, a[t][ai + r] >> 16 * h);
                    if (r < 2) right[2 * c + r * 8 + h][g] = aptc_half(type, b[t][bi + r] >> 16 * h);
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
static __device__ __forceinline__ float aptc_half(apt_dtype type, uint32_t bits)
{
    return type == APT_BF16 ? aptc_bf16_to_f32((uint16_t)bits) : __half2float(__ushort_as_half((uint16_t)bits));
}

static __device__ __forceinline__ uint32_t aptc_pack(apt_dtype type, float x, float y)
{
    union { __nv_bfloat162 b; __half2 h; uint32_t bits; } pair = {__nv_bfloat162()};
    if (type == APT_BF16) pair.b = __floats2bfloat162_rn(x, y);
    else pair.h = __floats2half2_rn(x, y);
    return pair.bits;
}

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
                d[di + r % 2 * 2 + v] += aptc_half(type, left & 0xffff) * aptc_half(type, right & 0xffff) +
                                         aptc_half(type, left >> 16) * aptc_half(type, right >> 16);
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
#define APTC_SWEEP_ROOM(a) aptc_room_of(a, 4, 0, 2, 2)
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

/* Thread t's share of the sums over the rows of x, a block's tile of o or d_o, which has as many columns as a head and begins at
   (row, column) */
APTC_DEVICE void aptc_attention_sums(const aptc_attention *a, int64_t bx, int64_t by, int32_t t, aptc_view x, int64_t row,
                                     int64_t column, int64_t rows)
{
    if (a->sizes == NULL && a->sums == NULL) return;
    for (int32_t c = t; c < a->dim; c += APTC_BLOCK) {
        const int64_t at = ((by / a->heads * a->blocks + bx) * a->heads + by % a->heads) * a->dim + c;
        float size = 0, sum = 0;
        for (int64_t i = 0; i < rows; i++) {
            const float value = aptc_get(&x, row + i, column + c);
            size += fabsf(value);
            sum += value;
        }
        if (a->sizes != NULL) a->sizes[at] = size;
        if (a->sums != NULL) a->sums[at] = sum;
    }
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
            w.value[u] = aptc_half((apt_dtype)x->type, pair[u / 2] >> 16 * (u % 2) & 0xffff);
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
        if (next < seen) {
            const int32_t coming = (turn + f.stages - 1) & (f.stages - 1);
            uint16_t *to = others + coming * 2 * f.other;
            APTC_FLASH_LOAD_KEYS(to, a->k, next, f.tile);
            APTC_FLASH_LOAD_KEYS(to + f.other, a->v, next, f.tile);
            APTC_THREADS(t) aptc_flash_bias(a, &p, t, diagonals + coming * f.floats, q0, next, f.tile, false);
        }
        APTC_COPIES_END;
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

/* Thread t's share of P and dS of the tile at (q0, k0) from Q K^T and dO V^T, which lie in their places.
   Where a query does not see a key both are 0. dS is the gradient of the logits. */
APTC_DEVICE void aptc_gradient_rows(const aptc_attention *a, const aptc_place *p, int32_t t, int64_t q0, int64_t k0, float *room,
                                    const aptc_room *r)
{
    for (int32_t i = t / APTC_WARP; i < a->tile; i += APTC_WARPS) {
        const int64_t limit = aptc_limit(a, p, q0 + i), at = (p->q_row + q0 + i) * a->heads + p->head;
        const float lse = limit > 0 ? a->lse[at] : 0.0f, mean = limit > 0 && a->dot != NULL ? a->dot[at] : 0.0f;
        for (int32_t c = t % APTC_WARP; c < a->tile; c += APTC_WARP) {
            const int32_t place = i * r->ld_square + c;
            float *prob = APTC_FLOATS(r->square[0]) + place, *ds = APTC_FLOATS(r->square[1]) + place;
            const bool sees = k0 + c < limit;
            *prob = sees ? expf(aptc_logit(a, p, q0 + i, k0 + c, *prob) - lse) : 0.0f;
            *ds = sees ? *prob * (*ds - mean) : 0.0f;
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
#define APTC_GRADIENT_TILE(p)                                                                                           \
    do {                                                                                                                \
        const aptc_tile_product logits = APTC_TILE_DOTS(r.square[0], r.operand[0], r.operand[1]);                       \
        const aptc_tile_product slopes = APTC_TILE_DOTS(r.square[1], r.operand[3], r.operand[2]);                       \
        aptc_tile_multiply(&logits, job.type);                                                                          \
        aptc_tile_multiply(&slopes, job.type);                                                                          \
        APTC_BARRIER;                                                                                                   \
        APTC_THREADS(t) aptc_gradient_rows(&job, &(p), t, q0, k0, room, &r);                                            \
    } while (0)

/* dot by a sweep over the keys, dot_i = sum over j of P(i, j) dP(i, j) / sum over j of P(i, j). With it the rows of dS sum to 0
   up to the rounding of dS; d_o . o leaves the rounding of its own terms, which hides small gradients where values are nearly
   alike.
   Block: BX = tile of queries, BY = (sequence, head) */
APTC_KERNEL(aptc_attention_sweep_kernel, aptc_attention)
{
    APTC_ROOM(APTC_SWEEP_ROOM);
    APTC_PRIVATE(float, part_dot);
    APTC_PRIVATE(float, part_sum);
    float *dot = APTC_FLOATS(r.vector[0]), *sum = APTC_FLOATS(r.vector[1]);
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * job.tile, seen = aptc_seen_keys(&job, &p, q0);
    if (q0 >= p.queries) return;
    APTC_LOAD_GIVEN(p);
    APTC_THREADS(t) if (t < job.tile) dot[t] = sum[t] = 0;
    for (int64_t k0 = 0; k0 < seen; k0 += job.tile) {
        APTC_BARRIER;
        APTC_LOAD_SEEN(p);
        APTC_BARRIER;
        APTC_GRADIENT_TILE(p);
        APTC_BARRIER;
        for (int32_t i0 = 0; i0 < job.tile; i0 += APTC_WARPS) {
            APTC_THREADS(t) {
                const int32_t i = i0 + t / APTC_WARP;
                APTC_MINE(part_dot, t) = APTC_MINE(part_sum, t) = 0;
                for (int32_t c = t % APTC_WARP; c < job.tile; c += APTC_WARP) {
                    APTC_MINE(part_sum, t) += APTC_FLOATS(r.square[0])[i * r.ld_square + c];
                    APTC_MINE(part_dot, t) += APTC_FLOATS(r.square[1])[i * r.ld_square + c];
                }
            }
            APTC_WARP_SUM(part_dot);
            APTC_WARP_SUM(part_sum);
            APTC_THREADS(t) if (t % APTC_WARP == 0) {
                dot[i0 + t / APTC_WARP] += APTC_MINE(part_dot, t);
                sum[i0 + t / APTC_WARP] += APTC_MINE(part_sum, t);
            }
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) if (t < job.tile && q0 + t < p.queries)
        job.dot_out[(p.q_row + q0 + t) * job.heads + p.head] = sum[t] > 0 ? dot[t] / sum[t] : dot[t];
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
        if (next < seen) {
            const int32_t coming = (turn + f.stages - 1) & (f.stages - 1);
            uint16_t *to = others + coming * 2 * f.other;
            APTC_FLASH_LOAD_KEYS(to, a->k, next, f.tile);
            APTC_FLASH_LOAD_KEYS(to + f.other, a->v, next, f.tile);
            APTC_THREADS(t) aptc_flash_bias(a, &p, t, diagonals + coming * f.floats, q0, next, f.tile, false);
        }
        APTC_COPIES_END;
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

static aptc_view aptc_floats(const float *x, int64_t ld)
{
    const aptc_view v = {(void *)(uintptr_t)x, ld, APT_F32};
    return v;
}

static aptc_attention aptc_attention_of(const aptc_device *d, const apti_attention_job *op)
{
    const apti_attention_op *o = op->op;
    aptc_attention a;
    memset(&a, 0, sizeof a);
    a.q = aptc_floats(op->q, op->ldq);
    a.k = aptc_floats(op->k, op->ldk);
    a.v = aptc_floats(op->v, op->ldv);
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
    a.o = aptc_floats(op->out, op->ldo);
    a.lse_out = op->lse;
    d->waiting.attention = a;
    aptc_wait(d, APTC_ATTENTION, op->out, op->ldo, op->rows_q, (int64_t)a.heads * a.dim);
    return true;
}

static void aptc_attention_forward_run(aptc_device *d, aptc_attention *a, const apti_column_job *sizes,
                                       const apti_column_job *sums)
{
    const int64_t rows = a->sequences * a->blocks;
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

/* dot(rows, heads) of the backward */
static void aptc_attention_dots(aptc_device *d, const apti_attention_job *op, const aptc_attention *given, float *dot)
{
    aptc_attention a = *given;
    a.dot_out = dot;
    a.dot = NULL;
    if (op->o == NULL || d->math == APT_CUDA_FP32) {
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_sweep_kernel, a, aptc_ceil(op->longest_q, a.tile), (int64_t)a.sequences * a.heads,
                            APTC_SWEEP_ROOM(&a).end);
        return;
    }
    a.o = aptc_floats(op->o, op->ldo);
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
    float *dot = (float *)aptc_take(d, op->rows_q * a.heads * (int64_t)sizeof(float));
    a.dbias = op->dbias == NULL ? NULL : (float *)aptc_take(d, pairs * wide * (int64_t)sizeof(float));
    if (dot == NULL || (op->dbias != NULL && a.dbias == NULL)) return false;
    a.d_o = aptc_floats(op->d_o, op->lddo);
    a.lse = op->saved;
    a.dq = aptc_floats(op->dq, op->lddq);
    a.dk = aptc_floats(op->dk, op->lddk);
    a.dv = aptc_floats(op->dv, op->lddv);
    keys = a;
    if (a.type != APT_F32 && !aptc_flash_choose(d, &keys, true)) return false;
    aptc_attention_dots(d, op, &a, dot);
    a.dot = keys.dot = dot;
    aptc_attention queries = keys;
    queries.blocks = aptc_ceil(op->longest_q, keys.rows);
    queries.sizes = aptc_sizes_for(d, sum, a.sequences * queries.blocks);
    aptc_attention_backward_run(d, op, &queries, &keys);
    if (op->dbias != NULL) {
        const aptc_fold fold = {op->dbias, a.dbias, NULL, a.sequences, a.heads * wide, a.heads * wide, false};
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_dbias_kernel, a, 1, pairs, APTC_DBIAS_ROOM(&a).end);
        APTC_LAUNCH_FOLD(d, fold);
    }
    aptc_sizes_add(d, queries.sizes, sum, a.sequences * queries.blocks);
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
    float *c;
    const float *bias;
    int64_t m, n, k, ldc, accumulate;
} aptc_product;

#ifdef APT_CUDA_EMULATE
/* Block: row BX */
APTC_KERNEL(aptc_product_kernel, aptc_product)
{
    const int64_t i = APTC_BX;
    for (int64_t j = 0; j < job.n; j++) {
        double sum = job.accumulate != 0 ? (double)job.c[i * job.ldc + j] : 0.0;
        for (int64_t p = 0; p < job.k; p++)
            sum += (double)aptc_load(job.a.data, job.a.type, job.a.transposed ? p * job.a.ld + i : i * job.a.ld + p) *
                   (double)aptc_load(job.b.data, job.b.type, job.b.transposed ? j * job.b.ld + p : p * job.b.ld + j);
        job.c[i * job.ldc + j] = (float)(sum + (job.bias != NULL ? (double)job.bias[j] : 0.0));
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

static void aptc_blas_make(aptc_device *d, aptc_blas *x, const aptc_product *p)
{
    const cublasComputeType_t compute = d->math == APT_CUDA_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    const cudaDataType_t type = p->a.type == APT_BF16 ? CUDA_R_16BF : p->a.type == APT_F16 ? CUDA_R_16F : CUDA_R_32F;
    const cublasOperation_t first = p->b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = p->a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t bias = CUBLASLT_EPILOGUE_BIAS;
    const cudaDataType_t bias_type = CUDA_R_32F;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;    /* no atomics */
    const uint32_t align_a = aptc_alignment(p->b.data), align_b = aptc_alignment(p->a.data), align_c = aptc_alignment(p->c);
    aptc_blas_check(d, cublasLtMatmulDescCreate(&x->desc, compute, CUDA_R_32F), "cublasLtMatmulDescCreate");
    if (x->desc == NULL) return;
    cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    if (p->bias != NULL) {
        cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &bias, sizeof bias);
        cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
        cublasLtMatmulDescSetAttribute(x->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    }
    aptc_blas_check(d, cublasLtMatrixLayoutCreate(&x->a, type, (uint64_t)(p->b.transposed ? p->k : p->n),
                                                  (uint64_t)(p->b.transposed ? p->n : p->k), p->b.ld), "layout of B");
    aptc_blas_check(d, cublasLtMatrixLayoutCreate(&x->b, type, (uint64_t)(p->a.transposed ? p->m : p->k),
                                                  (uint64_t)(p->a.transposed ? p->k : p->m), p->a.ld), "layout of A");
    aptc_blas_check(d, cublasLtMatrixLayoutCreate(&x->c, CUDA_R_32F, (uint64_t)p->n, (uint64_t)p->m, p->ldc), "layout of C");
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
    key.ldc = p->ldc;
    key.form = 1 | p->a.transposed << 1 | p->b.transposed << 2 | (p->bias != NULL) << 3 | (p->accumulate != 0) << 4 |
               (p->a.type == APT_BF16) << 5 | (p->a.type == APT_F16) << 6 |
               (int32_t)(aptc_alignment(p->a.data) << 8 | aptc_alignment(p->b.data) << 16 | aptc_alignment(p->c) << 24);
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
        aptc_blas_check(d, cublasLtMatmul(d->blas, x.desc, &one, p->b.data, x.a, p->a.data, x.b, &beta, p->c, x.c, p->c, x.c,
                                          algorithm, d->blas_work, d->blas_bytes, d->stream), "cublasLtMatmul");
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
    aptc_kept want;
    memset(&want, 0, sizeof want);
    want.first = (uintptr_t)job->from;
    want.end = want.first + (uintptr_t)(((job->rows - 1) * job->ld_from + job->n) * aptc_size(job->from_type));
    want.rows = job->rows;
    want.cols = job->n;
    want.ld = job->ld_from;
    *here = false;
    if (job->rows * job->n < APTC_KEPT_ELEMENTS || job->rows * job->ld_to * aptc_size(job->to_type) > d->kept_bytes) return NULL;
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
    aptc_cast job = {NULL, x.data, ld, x.ld, rows, cols, type, x.type};
    bool here = false;
    if (keep) job.to = aptc_keep(d, &job, &here);
    if (job.to == NULL) job.to = aptc_take(d, rows * ld * aptc_size(type));
    if (job.to != NULL && !here) APTC_LAUNCH_EACH(d, aptc_cast_kernel, job);
    x.data = job.to;
    x.type = type;
    x.ld = ld;
    return x;
}

static aptc_operand aptc_left(const apti_gemm_part *part)
{
    aptc_operand x = {part->a, part->a_row, APT_F32, 0};
    if (part->a_col != 1) {
        x.ld = part->a_col;
        x.transposed = 1;
    }
    return x;
}

static aptc_operand aptc_right(const apti_gemm_part *part)
{
    const bool packed = part->kind == APTI_B_PACKED || part->kind == APTI_B_PACKED_T;
    aptc_operand x = {packed ? part->packed->data : part->b, packed ? part->packed->k : part->ldb,
                      packed ? part->packed->type : APT_F32, part->kind == APTI_B_PACKED || part->kind == APTI_B_PLAIN_T};
    return x;
}

static int64_t aptc_bytes(int64_t rows, int64_t cols) { return (rows * ((cols + 7) / 8 * 8) * 4 + 255) / 256 * 256; }

/* One part of a product. Where the workspace cannot take the whole of an operand, the reduction or the rows are cut. */
static bool aptc_part_run(aptc_device *d, const apti_gemm *g, const apti_gemm_part *part, float *c, int64_t ldc, bool accumulate,
                          const float *bias)
{
    const apt_dtype type = aptc_math_type(d);
    aptc_operand a = aptc_left(part), b = aptc_right(part);
    const int64_t room = (int64_t)(d->work_bytes - d->used) / 2;
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
        const int64_t k = aptc_min(step_k, part->k - p0), size = aptc_size(b.type);
        aptc_operand right = b;
        right.data = (const char *)b.data + (b.transposed ? p0 : p0 * b.ld) * size;
        right = aptc_convert(d, right, b.transposed ? g->n : k, b.transposed ? k : g->n, type, keep && part->packed == NULL);
        const size_t beside = d->used;
        for (int64_t i0 = 0; i0 < g->m; i0 += step_m) {
            const int64_t m = aptc_min(step_m, g->m - i0);
            aptc_operand left = a;
            left.data = (const float *)a.data + (a.transposed ? p0 * a.ld + i0 : i0 * a.ld + p0);
            left = aptc_convert(d, left, a.transposed ? k : m, a.transposed ? m : k, type, keep);
            if (left.data == NULL || right.data == NULL) return false;
            const aptc_product product = {left, right, c + i0 * ldc, p0 == 0 ? bias : NULL, m, g->n, k, ldc,
                                          accumulate || p0 > 0};
            aptc_product_run(d, &product);
            d->used = beside;
        }
        d->used = used;
    }
    return true;
}

/* The rows of z when nothing is multiplied: c, 0, or the bias alone. */
static void aptc_start(aptc_device *d, const apti_gemm *g, float *z, int64_t ldz)
{
    if (g->accumulate) return;
    const apti_copy_job job = {z, g->bias, ldz, 0, g->m, g->n};
    APTC_LAUNCH_EACH(d, aptc_copy_kernel, job);
}

/* The sums grow where z is wanted: in pre, else in c; where c still holds the residual, which is added without an activation
   before it, they grow on top of that. */
static bool aptc_gemm_op(aptc_device *d, const apti_gemm *g)
{
    const bool onto = g->residual != NULL && g->residual == g->c && g->pre == NULL;
    if (onto && (g->act >= 0 || g->accumulate)) return false;
    float *z = g->pre != NULL ? g->pre : g->c;
    const int64_t ldz = g->pre != NULL ? g->ld_pre : g->ldc;
    aptc_unkeep(d, g->c, ((g->m - 1) * g->ldc + g->n) * 4);
    if (g->pre != NULL) aptc_unkeep(d, g->pre, ((g->m - 1) * g->ld_pre + g->n) * 4);
    bool more = g->accumulate || onto, biased = g->bias == NULL;
    if (g->pre != NULL && g->accumulate) {
        const apti_copy_job job = {g->pre, g->c, g->ld_pre, g->ldc, g->m, g->n};
        APTC_LAUNCH_EACH(d, aptc_copy_kernel, job);
    }
    for (int32_t q = 0; q < 2; q++) {
        if (g->part[q].k == 0) continue;
        if (!aptc_part_run(d, g, &g->part[q], z, ldz, more, biased ? NULL : g->bias)) {
            aptc_fail(d, APT_E_MEMORY, "a product %lld x %lld x %lld does not fit the workspace", (long long)g->m,
                      (long long)g->n, (long long)g->part[q].k);
            return true;
        }
        more = biased = true;
    }
    const aptc_finish f = {g->c, NULL, NULL, z, onto ? NULL : g->residual, g->mask, g->ldc, 0, ldz, g->ld_residual, g->m, g->n,
                           g->act};
    if (!more) aptc_start(d, g, z, ldz);
    else if (!biased) {                           /* an empty product onto c, with a bias: as a residual of one row */
        const apti_residual_job job = {NULL, z, z, g->bias, NULL, ldz, ldz, 0, g->m, g->n, 0};
        aptc_residual_run(d, &job, NULL, false);
    }
    if (g->pre == NULL && g->act < 0 && f.residual == NULL && g->mask == NULL) return true;
    d->waiting.finish = f;
    aptc_wait(d, APTC_FINISH, f.c, f.ldc, f.rows, f.n);
    return true;
}

static bool aptc_pack_op(aptc_device *d, const apti_pack_job *op)
{
    const apti_packed *p = op->packed;
    const aptc_cast job = {p->data, op->w, p->k, op->ldw, p->n, p->k, p->type, APT_F32};
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
    case APTC_ACT: aptc_act_backward_run(d, &d->waiting.act, sizes, true); break;
    case APTC_RESIDUAL: aptc_residual_run(d, &d->waiting.residual, sizes, true); break;
    case APTC_NORM: aptc_norm_run(d, &d->waiting.norm, false, sizes); break;
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
    const bool fits = (size_t)(APTC_CHUNKS * op->n) * sizeof(float) <= d->work_bytes;      /* alone, if need be */
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
    case APTI_OP_COPY: APTC_LAUNCH_EACH(d, aptc_copy_kernel, *(const apti_copy_job *)job); return true;
    case APTI_OP_SCALE:
        APTC_LAUNCH_VECTOR(d, aptc_scale_kernel, *(const apti_scale_job *)job, ((const apti_scale_job *)job)->n);
        return true;
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
    case APTI_OP_GATE_BACKWARD: aptc_gate_run(d, (const apti_gate_job *)job, true, sum); return true;
    case APTI_OP_TANH_FORWARD: APTC_LAUNCH_EACH(d, aptc_tanh_forward_kernel, *(const apti_tanh_job *)job); return true;
    case APTI_OP_TANH_BACKWARD: APTC_LAUNCH_EACH(d, aptc_tanh_backward_kernel, *(const apti_tanh_job *)job); return true;
    case APTI_OP_EMBED: return aptc_embed_op(d, (const apti_embed_job *)job);
    case APTI_OP_GATHER: return aptc_gather_op(d, (const apti_rows_job *)job);
    case APTI_OP_SCATTER: return aptc_scatter_op(d, (const apti_rows_job *)job);
    case APTI_OP_CROSS_ENTROPY: return aptc_cross_entropy_op(d, (const apti_loss_job *)job);
    case APTI_OP_KL: APTC_LAUNCH(d, aptc_kl_kernel, *(const apti_kl_job *)job, ((const apti_kl_job *)job)->rows, 1); return true;
    case APTI_OP_LAYER_LOSS:
        APTC_LAUNCH(d, aptc_layer_loss_kernel, *(const apti_layer_loss *)job, ((const apti_layer_loss *)job)->rows, 1);
        return true;
    case APTI_OP_SQUARES: return aptc_squares_op(d, (const apti_squares_job *)job);
    case APTI_OP_ADAM: return aptc_adam_op(d, (const apti_adam_job *)job);
    case APTI_OP_CUT: return aptc_cut_op(d, (const apti_cut_job *)job);
    case APTI_OP_COUNT: default: return false;
    }
    if (!done) aptc_sizes_add(d, NULL, sum, 0);
    return done;
}

static apt_result aptc_sync(void *self, char message[APTI_BACKEND_MESSAGE])
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
    aptc_issue_all(d);
    d->givens = 0;
    memset(d->kept, 0, sizeof d->kept);           /* the CPU may write next */
#ifdef APT_CUDA_EMULATE
    for (int32_t i = 0; i < d->queued; i++) d->queue[i].kernel(d->queue[i].job.bytes, d->queue[i].bx, d->queue[i].by);
    d->queued = 0;
#else
    aptc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize");
#endif
    const apt_result r = d->result;
    memcpy(message, d->message, sizeof d->message);
    d->result = APT_OK;
    return r;
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
    d->backend.sync = aptc_sync;
    d->backend.close = aptc_close;
    return &d->backend;
}
#endif /* APT_CUDA_IMPLEMENTATION */
