/* apt_cuda.h - the device for apt.h: the same training on an NVIDIA GPU - public domain or MIT, your choice (see apt.h)

   An optional companion of apt.h. A program that uses it stays as it is but for one line, and links one more unit, compiled by
   nvcc, against cuBLASLt:

       // my_program.c
       #include "apt.h"
       #include "apt_cuda.h"

       apt_desc desc = APT_ZERO;
       desc.backend = apt_cuda_open(NULL, message, sizeof message);      // NULL: no device; the message says why
       apt_ctx *ctx = apt_create(&desc);

       // gpu.cu:  nvcc -O2 -c gpu.cu;  cc my_program.o gpu.o -lcublasLt -lcudart -lstdc++ -lm -lpthread
       #define APT_CUDA_IMPLEMENTATION
       #include "apt_cuda.h"

   Models, trainers, files, decisions and results stay what they are. Weights, gradients and activations lie in managed memory,
   which the device and the CPU both address; operations go into one stream, in order, and the CPU waits before it looks. What
   this file has no kernel for, the CPU computes. No result hangs on the order in which threads run: there are no atomic sums.
   Refused, because the CPU's kernels alone can do it, are quantised models, apt_model_compress and modules (apt_moe_create,
   apt_bk_core_create, apt_bk_layer_create), whose arrays are the caller's.

   HOW THE KERNELS ARE WRITTEN
   A kernel's body is a row of phases, each of which every thread of the block runs (APTC_THREADS), with barriers between them, so
   that it is also plain C: with APT_CUDA_EMULATE the same bodies run on the CPU, block after block and thread after thread, and
   launches wait in a queue until somebody synchronises, so that a missing wait shows. That is how the index arithmetic is tested,
   under the address sanitizer and on machines without a device. */
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
    void *(*alloc)(size_t bytes, void *user);      /* both or none: memory that the device and the CPU can both address, any */
    void (*release)(void *memory, void *user);     /* alignment; none: cudaMallocManaged, for the workspace cudaMalloc */
    void *alloc_user;
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
#include <cuda_runtime.h>
#endif

/* ---------------------------------------------------------------------------------------------------------------------
   The device, or its emulation

   APTC_KERNEL(name, args)   a kernel whose only argument is the struct `args`, called job
   APTC_BX, APTC_BY          the block's coordinates
   APTC_THREADS(t)           a phase: every thread of the block, t = 0 .. APTC_BLOCK - 1
   APTC_BARRIER              between two phases when one reads what another thread has written
   APTC_SHARED(type, x, n)   an array of the block; APTC_DYNAMIC: the one whose size is given at the launch, n at most
   APTC_PRIVATE(type, x)     a variable of each thread that outlives a phase; APTC_MINE(x, t) is t's; likewise APTC_PRIVATE_ARRAY
   APTC_WARP_SUM(x)          x of every thread = the sum of x over its warp, in a fixed order; likewise APTC_WARP_MAX
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTC_BLOCK = 256, APTC_WARP = 32, APTC_WARPS = APTC_BLOCK / APTC_WARP };

#ifdef APT_CUDA_EMULATE
#define APTC_DEVICE static
#define APTC_KERNEL(name, args) static void name(const args job, const int64_t aptc_bx, const int64_t aptc_by)
#define APTC_BX aptc_bx
#define APTC_BY aptc_by
#define APTC_THREADS(t) for (int32_t t = 0; t < APTC_BLOCK; t++)
#define APTC_BARRIER ((void)0)
#define APTC_SHARED(type, x, n) type x[n]
#define APTC_DYNAMIC(type, x, n) type x[n]
#define APTC_PRIVATE(type, x) type x[APTC_BLOCK]
#define APTC_PRIVATE_ARRAY(type, x, n) type x[APTC_BLOCK][n]
#define APTC_MINE(x, t) x[t]
#define APTC_WARP_SUM(x) aptc_warp_reduce(x, false)
#define APTC_WARP_MAX(x) aptc_warp_reduce(x, true)
#define APTC_UNUSED_BX (void)aptc_bx
#define APTC_UNUSED_BY (void)aptc_by

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
#define APTC_BX ((int64_t)blockIdx.x)
#define APTC_BY ((int64_t)blockIdx.y)
#define APTC_THREADS(t) for (int32_t t = (int32_t)threadIdx.x, aptc_once = 0; aptc_once == 0 && t >= 0; aptc_once = 1)
#define APTC_BARRIER __syncthreads()
#define APTC_SHARED(type, x, n) __shared__ type x[n]
#define APTC_DYNAMIC(type, x, n) extern __shared__ type x[]
#define APTC_PRIVATE(type, x) type x
#define APTC_PRIVATE_ARRAY(type, x, n) type x[n]
#define APTC_MINE(x, t) x
#define APTC_WARP_SUM(x) x = aptc_warp_reduce(x, false)
#define APTC_WARP_MAX(x) x = aptc_warp_reduce(x, true)
#define APTC_UNUSED_BX ((void)0)
#define APTC_UNUSED_BY ((void)0)

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

/* ---------------------------------------------------------------------------------------------------------------------
   The queue
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTC_JOB_BYTES = 512, APTC_ALGORITHMS = 512 };

#ifdef APT_CUDA_EMULATE
/* A launch that waits: run(job, blocks) does all of it. */
typedef struct aptc_launch {
    void (*run)(const void *job, int64_t bx, int64_t by);
    int64_t bx, by;
    size_t bytes;                     /* of the job */
    union { double align; char bytes[APTC_JOB_BYTES]; } job;
} aptc_launch;
#else
/* The algorithm that cuBLASLt proposed for a product of this form, so that it is asked once. */
typedef struct aptc_algorithm {
    int64_t m, n, k, lda, ldb, ldc;
    int32_t form;                     /* transpositions, types, bias, accumulate, alignment; 0: a free place */
    cublasLtMatmulAlgo_t algorithm;
} aptc_algorithm;
#endif

typedef struct aptc_device {
    apt_backend backend;
    apt_cuda_desc desc;
    apt_cuda_math math;
    char *work;                       /* workspace_bytes: see aptc_take */
    void *block;                      /* what it lies in */
    size_t work_bytes, used;
    apt_result result;                /* first failure since the last sync */
    char message[APTI_BACKEND_MESSAGE];
#ifdef APT_CUDA_EMULATE
    aptc_launch *queue;
    int32_t queued, capacity;
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
static void aptc_push(aptc_device *d, void (*body)(const void *, int64_t, int64_t), const void *job, size_t bytes, int64_t bx,
                      int64_t by)
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
    aptc_launch *l = &d->queue[d->queued++];
    l->run = body;
    l->bx = bx;
    l->by = by;
    l->bytes = bytes;
    memcpy(l->job.bytes, job, bytes);
}

/* Defines name_run, which APTC_LAUNCH puts into the queue. */
#define APTC_LAUNCHER(name, args)                                                                                       \
    static void name##_run(const void *job, int64_t bx, int64_t by)                                                     \
    {                                                                                                                   \
        args copy;                                                                                                      \
        memcpy(&copy, job, sizeof copy);                                                                                \
        for (int64_t y = 0; y < by; y++)                                                                                \
            for (int64_t x = 0; x < bx; x++) name(copy, x, y);                                                          \
    }
#define APTC_LAUNCH(d, name, job, bx, by) aptc_push(d, name##_run, &(job), sizeof(job), bx, by)
#define APTC_LAUNCH_DYNAMIC(d, name, job, bx, by, bytes) ((void)(bytes), APTC_LAUNCH(d, name, job, bx, by))
#else
#define APTC_LAUNCHER(name, args)
#define APTC_LAUNCH(d, name, job, bx, by) APTC_LAUNCH_DYNAMIC(d, name, job, bx, by, 0)
#define APTC_LAUNCH_DYNAMIC(d, name, job, bx, by, bytes)                                                                \
    do {                                                                                                                \
        const int64_t aptc_gx = (bx), aptc_gy = (by);                                                                   \
        if (aptc_gx > 0 && aptc_gy > 0)                                                                                 \
            name<<<dim3((unsigned)aptc_gx, (unsigned)aptc_gy), APTC_BLOCK, (size_t)(bytes), (d)->stream>>>(job);        \
        aptc_check(d, cudaGetLastError(), #name);                                                                       \
    } while (0)

static void aptc_check(aptc_device *d, cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return;
    aptc_fail(d, error == cudaErrorMemoryAllocation ? APT_E_MEMORY : APT_E_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}
#endif

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

/* Matrices that are read and written element by element: thread per element, columns side by side, a row per APTC_BY. */
static int64_t aptc_columns(int64_t n) { return aptc_ceil(n, APTC_BLOCK); }

/* More rows than a grid is high: a block goes on with row APTC_BY + APTC_ROWS, and so on. */
enum { APTC_ROWS = 32768 };
#define APTC_EACH(job_rows, job_n)                                                                                      \
    for (int64_t i = APTC_BY; i < (job_rows); i += APTC_ROWS)                                                           \
        APTC_THREADS(t)                                                                                                 \
            for (int64_t j = APTC_BX * APTC_BLOCK + t, aptc_last = 0; j < (job_n) && aptc_last == 0; aptc_last = 1)
#define APTC_LAUNCH_EACH(d, name, job) APTC_LAUNCH(d, name, job, aptc_columns((job).n), aptc_min((job).rows, APTC_ROWS))

/* What follows a product: pre = z;  c = (act(z) + residual) * mask. z may be c, pre or residual. */
typedef struct aptc_finish {
    float *c, *pre;
    const float *z, *residual, *mask;
    int64_t ldc, ld_pre, ldz, ld_residual, rows, n;
    int32_t act;
} aptc_finish;

APTC_KERNEL(aptc_finish_kernel, aptc_finish)
{
    APTC_EACH(job.rows, job.n) {
        float x = job.z[i * job.ldz + j], slope;
        if (job.pre != NULL && job.pre != job.z) job.pre[i * job.ld_pre + j] = x;
        x = aptc_act(x, job.act, &slope);
        if (job.residual != NULL) x += job.residual[i * job.ld_residual + j];
        if (job.mask != NULL) x *= job.mask[j];
        job.c[i * job.ldc + j] = x;
    }
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

APTC_KERNEL(aptc_act_backward_kernel, apti_act_job)
{
    APTC_EACH(job.rows, job.n) {
        float slope = 1, x = job.da[i * job.ldda + j];
        if (job.act >= 0) (void)aptc_act(job.pre[i * job.ld_pre + j], job.act, &slope);
        x *= slope;
        if (job.mask != NULL) x *= job.mask[j];
        job.du[i * job.lddu + j] = x;
    }
}
APTC_LAUNCHER(aptc_act_backward_kernel, apti_act_job)

APTC_KERNEL(aptc_residual_kernel, apti_residual_job)
{
    APTC_EACH(job.rows, job.n) {
        const float x = job.x[i * job.ldx + j] + job.r[i * job.ldr + j];
        job.y[i * job.ldy + j] = job.mask != NULL ? x * job.mask[j] : x;
    }
}
APTC_LAUNCHER(aptc_residual_kernel, apti_residual_job)

APTC_KERNEL(aptc_gate_forward_kernel, apti_gate_job)
{
    APTC_EACH(job.rows, job.n) {
        const float x = job.a[i * job.lda + j] * job.v[i * job.ldv + j];
        job.h[i * job.ldh + j] = job.mask != NULL ? x * job.mask[j] : x;
    }
}
APTC_LAUNCHER(aptc_gate_forward_kernel, apti_gate_job)

APTC_KERNEL(aptc_gate_backward_kernel, apti_gate_job)
{
    APTC_EACH(job.rows, job.n) {
        float slope;
        const float act = aptc_act(job.u[i * job.ldu + j], job.act, &slope), m = job.mask != NULL ? job.mask[j] : 1.0f;
        const float dh = job.dh[i * job.lddh + j] * m, v = job.v[i * job.ldv + j];
        job.dv[i * job.lddv + j] = dh * act;
        job.du[i * job.lddu + j] = dh * v * slope;
    }
}
APTC_LAUNCHER(aptc_gate_backward_kernel, apti_gate_job)

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
    APTC_UNUSED_BY;
    APTC_VECTOR(job.n) job.x[i] *= job.s;
}
APTC_LAUNCHER(aptc_scale_kernel, apti_scale_job)

APTC_KERNEL(aptc_adam_kernel, apti_adam_job)
{
    APTC_UNUSED_BY;
    APTC_VECTOR(job.n) {
        const float g = job.g[i] * job.grad_scale, w = job.w[i];
        float m = job.beta1 * job.m[i] + (1 - job.beta1) * g, v = job.beta2 * job.v[i] + (1 - job.beta2) * g * g;
        if (fabsf(m) < 7.8886091e-31f) m = 0;          /* 2^-100: as on the CPU, moments do not decay into denormals */
        if (v < 7.8886091e-31f) v = 0;
        job.m[i] = m;
        job.v[i] = v;
        const bool kept = job.mask == NULL || (job.mask[i / 64] >> (i % 64) & 1) != 0;
        job.w[i] = kept ? w - (job.step_size * m / (sqrtf(v) + job.eps) + job.decay * w) : 0.0f;
    }
}
APTC_LAUNCHER(aptc_adam_kernel, apti_adam_job)

/* ---------------------------------------------------------------------------------------------------------------------
   Sums over rows and over everything

   In two steps with a fixed order: blocks add up a chunk each in float, then the chunks are added in double.
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTC_FOLD_COLUMNS = 32, APTC_FOLD_LANES = APTC_BLOCK / APTC_FOLD_COLUMNS, APTC_CHUNKS = 128, APTC_CHUNK_ROWS = 64 };

/* acc(n) += mask * sum over the chunks of partial(chunks, n); mask NULL: ones; binary: every mask that is not 0 counts as 1 */
typedef struct aptc_fold { float *acc; const float *partial, *mask; int64_t chunks, stride, n; bool binary; } aptc_fold;

APTC_KERNEL(aptc_fold_kernel, aptc_fold)
{
    APTC_UNUSED_BY;
    APTC_VECTOR(job.n) {
        double total = 0;
        for (int64_t c = 0; c < job.chunks; c++) total += (double)job.partial[c * job.stride + i];
        double factor = job.mask != NULL ? (double)job.mask[i] : 1.0;
        if (job.binary && factor != 0) factor = 1;
        job.acc[i] = (float)((double)job.acc[i] + factor * total);
    }
}
APTC_LAUNCHER(aptc_fold_kernel, aptc_fold)

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

/* Block: APTC_FOLD_COLUMNS columns (BX) of a chunk (BY); APTC_FOLD_LANES threads share a column */
APTC_KERNEL(aptc_column_kernel, aptc_column)
{
    APTC_SHARED(float, sum, APTC_BLOCK);
    APTC_THREADS(t) {
        const int64_t j = APTC_BX * APTC_FOLD_COLUMNS + t % APTC_FOLD_COLUMNS, first = APTC_BY * job.chunk;
        const int64_t end = aptc_min(job.rows, first + job.chunk);
        float total = 0;
        for (int64_t i = first + t / APTC_FOLD_COLUMNS; j < job.n && i < end; i += APTC_FOLD_LANES)
            total += aptc_column_term(&job, i, j);
        sum[t] = total;
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const int64_t j = APTC_BX * APTC_FOLD_COLUMNS + t;
        float total = 0;
        for (int32_t lane = 0; t < APTC_FOLD_COLUMNS && lane < APTC_FOLD_LANES; lane++)
            total += sum[lane * APTC_FOLD_COLUMNS + t];
        if (t < APTC_FOLD_COLUMNS && j < job.n) job.partial[APTC_BY * job.n + j] = total;
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
    APTC_LAUNCH(d, aptc_column_kernel, *job, aptc_ceil(job->n, APTC_FOLD_COLUMNS), chunks);
    APTC_LAUNCH_VECTOR(d, aptc_fold_kernel, fold, job->n);
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

/* partial[block] = sum of squares of the block's elements */
typedef struct aptc_squares { double *partial; const float *x; int64_t n; } aptc_squares;

APTC_KERNEL(aptc_squares_kernel, aptc_squares)
{
    APTC_UNUSED_BY;
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
    APTC_UNUSED_BY;
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
   Norms: a warp per row
   ------------------------------------------------------------------------------------------------------------------ */

APTC_DEVICE bool aptc_alive(const float *mask, int64_t j) { return mask == NULL || mask[j] != 0.0f; }

APTC_KERNEL(aptc_norm_forward_kernel, apti_norm_job)
{
    APTC_UNUSED_BY;
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(float, count);
    APTC_PRIVATE(float, mean);
    APTC_THREADS(t) {
        const int64_t row = APTC_BX * APTC_WARPS + t / APTC_WARP;
        APTC_MINE(sum, t) = APTC_MINE(count, t) = 0;
        for (int64_t j = t % APTC_WARP; row < job.rows && j < job.d; j += APTC_WARP) {
            if (!aptc_alive(job.mask, j)) continue;
            APTC_MINE(sum, t) += job.z[row * job.ldz + j];
            APTC_MINE(count, t) += 1;
        }
    }
    APTC_WARP_SUM(sum);
    APTC_WARP_SUM(count);
    APTC_THREADS(t) {
        const int64_t row = APTC_BX * APTC_WARPS + t / APTC_WARP;
        APTC_MINE(mean, t) = job.rms || APTC_MINE(count, t) == 0 ? 0.0f : APTC_MINE(sum, t) / APTC_MINE(count, t);
        APTC_MINE(sum, t) = 0;
        for (int64_t j = t % APTC_WARP; row < job.rows && j < job.d; j += APTC_WARP) {
            const float x = job.z[row * job.ldz + j] - APTC_MINE(mean, t);
            if (aptc_alive(job.mask, j)) APTC_MINE(sum, t) += x * x;
        }
    }
    APTC_WARP_SUM(sum);
    APTC_THREADS(t) {
        const int64_t row = APTC_BX * APTC_WARPS + t / APTC_WARP;
        const float variance = APTC_MINE(count, t) == 0 ? 0.0f : APTC_MINE(sum, t) / APTC_MINE(count, t) + job.eps;
        const float rstd = variance == 0 ? 0.0f : 1.0f / sqrtf(variance), mu = APTC_MINE(mean, t);
        for (int64_t j = t % APTC_WARP; row < job.rows && j < job.d; j += APTC_WARP) {
            float m = job.mask != NULL ? job.mask[j] : 1.0f;
            if (job.rms && m != 0) m = 1;
            const float beta = job.beta != NULL ? job.beta[j] : 0.0f;
            job.y[row * job.ldy + j] = job.gamma[j] * m * ((job.z[row * job.ldz + j] - mu) * rstd) + beta * m;
        }
        if (job.stats != NULL && row < job.rows && t % APTC_WARP == 0) {
            job.stats[2 * row] = mu;
            job.stats[2 * row + 1] = rstd;
        }
    }
}
APTC_LAUNCHER(aptc_norm_forward_kernel, apti_norm_job)

/* gamma times what the forward has put on it */
APTC_DEVICE float aptc_norm_gamma(const apti_norm_job *job, int64_t j)
{
    if (job->mask == NULL) return job->gamma[j];
    if (job->rms) return job->mask[j] != 0.0f ? job->gamma[j] : 0.0f;
    return job->gamma[j] * job->mask[j];
}

APTC_KERNEL(aptc_norm_backward_kernel, apti_norm_job)
{
    APTC_UNUSED_BY;
    APTC_PRIVATE(float, sum);
    APTC_PRIVATE(float, dot);
    APTC_PRIVATE(float, count);
    APTC_THREADS(t) {
        const int64_t row = APTC_BX * APTC_WARPS + t / APTC_WARP;
        APTC_MINE(sum, t) = APTC_MINE(dot, t) = APTC_MINE(count, t) = 0;
        for (int64_t j = t % APTC_WARP; row < job.rows && j < job.d; j += APTC_WARP) {
            if (!aptc_alive(job.mask, j)) continue;
            const float x = (job.z[row * job.ldz + j] - job.saved[2 * row]) * job.saved[2 * row + 1];
            const float g = job.dy[row * job.lddy + j] * aptc_norm_gamma(&job, j);
            APTC_MINE(sum, t) += g;
            APTC_MINE(dot, t) += g * x;
            APTC_MINE(count, t) += 1;
        }
    }
    APTC_WARP_SUM(sum);
    APTC_WARP_SUM(dot);
    APTC_WARP_SUM(count);
    APTC_THREADS(t) {
        const int64_t row = APTC_BX * APTC_WARPS + t / APTC_WARP;
        const float n = APTC_MINE(count, t) > 1 ? APTC_MINE(count, t) : 1.0f;
        const float average = job.rms ? 0.0f : APTC_MINE(sum, t) / n, slope = APTC_MINE(dot, t) / n;
        for (int64_t j = t % APTC_WARP; row < job.rows && j < job.d; j += APTC_WARP) {
            const float rstd = job.saved[2 * row + 1], x = (job.z[row * job.ldz + j] - job.saved[2 * row]) * rstd;
            const float g = job.dy[row * job.lddy + j] * aptc_norm_gamma(&job, j);
            job.y[row * job.ldy + j] = aptc_alive(job.mask, j) ? rstd * (g - average - x * slope) : 0.0f;
        }
    }
}
APTC_LAUNCHER(aptc_norm_backward_kernel, apti_norm_job)

static bool aptc_norm_forward_op(aptc_device *d, const apti_norm_job *op)
{
    APTC_LAUNCH(d, aptc_norm_forward_kernel, *op, aptc_ceil(op->rows, APTC_WARPS), 1);
    return true;
}

/* dgamma and dbeta first: dz may be dy. */
static bool aptc_norm_backward_op(aptc_device *d, const apti_norm_job *op)
{
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
    if (op->dgamma != NULL && !aptc_column_run(d, op->dgamma, &job, op->mask, op->rms)) return false;
    if (op->y != NULL) APTC_LAUNCH(d, aptc_norm_backward_kernel, *op, aptc_ceil(op->rows, APTC_WARPS), 1);
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
    APTC_LAUNCH(d, aptc_embed_kernel, *op, aptc_columns(op->d), aptc_min(op->rows, APTC_ROWS));
    return true;
}

APTC_KERNEL(aptc_gather_kernel, apti_rows_job)
{
    APTC_EACH(job.rows, job.d) job.x[i * job.ldx + j] = job.from[job.index[i] * job.ld_from + j];
}
APTC_LAUNCHER(aptc_gather_kernel, apti_rows_job)

static bool aptc_gather_op(aptc_device *d, const apti_rows_job *op)
{
    APTC_LAUNCH(d, aptc_gather_kernel, *op, aptc_columns(op->d), aptc_min(op->rows, APTC_ROWS));
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
        if (op->rows > 0) APTC_LAUNCH(d, aptc_place_kernel, *op, aptc_columns(op->d), aptc_min(op->rows, APTC_ROWS));
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
    APTC_LAUNCH(d, aptc_scatter_kernel, job, aptc_columns(op->d), aptc_min(op->targets, APTC_ROWS));
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
    APTC_UNUSED_BY;
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
    APTC_UNUSED_BY;
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
    APTC_UNUSED_BY;
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
   Attention

   A block holds a tile of APTC_TILE queries by APTC_TILE keys and walks over the other side, as the CPU does, with a running
   maximum and sum; nothing is ever T x T. The backward has a kernel for dq, which walks over the keys, one for dk and dv, which
   walks over the queries of all heads of a group, and one for the gradient of the bias, summed by sequence and then over them.
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    APTC_TILE = 32,
    APTC_SPAN = APTC_BLOCK / APTC_TILE,   /* threads that share a row of a tile */
    APTC_HEAD_MAX = 128                   /* wider heads are the CPU's */
};

/* Floats of the tiles in a block: four of (APTC_TILE, dim), two of (APTC_TILE, APTC_TILE) */
#define APTC_ATTENTION_ROOM(dim) (4 * APTC_TILE * (dim) + 2 * APTC_TILE * (APTC_TILE + 1))

typedef struct aptc_attention {
    const float *q, *k, *v, *d_o, *lse, *bias, *mask, *dot;
    float *o, *lse_out, *dq, *dk, *dv, *dbias;        /* dbias: (sequences, heads, 2*span - 1) */
    const int32_t *q_offsets, *k_offsets, *k_ends;
    int64_t ldq, ldk, ldv, ldo, lddq, lddk, lddv;
    int64_t tiles;                    /* of the longest sequence */
    int32_t heads, share, dim, span, sequences, causal;
    float scale;
} aptc_attention;

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

/* Keys [0, limit) are visible to query i. */
APTC_DEVICE int64_t aptc_limit(const aptc_attention *a, const aptc_place *p, int64_t i)
{
    return a->causal ? aptc_max(0, aptc_min(p->keys, i + p->shift + 1)) : p->keys;
}

/* tile[APTC_TILE][dim] = rows first.. of one head, zeros behind `end`, times factor */
#define APTC_LOAD_TILE(tile, base, ld, row0, column, first, end, factor)                                                \
    APTC_THREADS(t) for (int32_t e = t; e < APTC_TILE * job.dim; e += APTC_BLOCK) {                                     \
        const int64_t r = (first) + e / job.dim;                                                                        \
        (tile)[e] = r < (end) ? (factor) * (base)[((row0) + r) * (ld) + (column) + e % job.dim] : 0.0f;                 \
    }

APTC_DEVICE float aptc_dot(const float *x, const float *y, int32_t n)
{
    float sum = 0;
    for (int32_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
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

/* Block: BX = tile of queries, BY = (sequence, head). Thread t has row t / APTC_SPAN of the tile and every APTC_SPAN-th
   column. */
APTC_KERNEL(aptc_attention_forward_kernel, aptc_attention)
{
    APTC_DYNAMIC(float, room, APTC_ATTENTION_ROOM(APTC_HEAD_MAX));
    float *q = room, *kv = q + APTC_TILE * job.dim, *acc = kv + APTC_TILE * job.dim, *s = acc + APTC_TILE * job.dim;
    APTC_SHARED(float, max, APTC_TILE);
    APTC_SHARED(float, sum, APTC_TILE);
    APTC_SHARED(float, shrink, APTC_TILE);
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * APTC_TILE, seen = aptc_limit(&job, &p, aptc_min(q0 + APTC_TILE, p.queries) - 1);
    if (q0 >= p.queries) return;
    APTC_LOAD_TILE(q, job.q, job.ldq, p.q_row, p.head * job.dim, q0, p.queries, 1.0f);
    APTC_THREADS(t) {
        for (int32_t e = t; e < APTC_TILE * job.dim; e += APTC_BLOCK) acc[e] = 0;
        if (t < APTC_TILE) {
            max[t] = -INFINITY;
            sum[t] = 0;
        }
    }
    for (int64_t k0 = 0; k0 < seen; k0 += APTC_TILE) {
        APTC_BARRIER;
        APTC_LOAD_TILE(kv, job.k, job.ldk, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
        APTC_BARRIER;
        APTC_THREADS(t) {
            const int32_t r = t / APTC_SPAN;
            const int64_t limit = q0 + r < p.queries ? aptc_limit(&job, &p, q0 + r) : 0;
            for (int32_t c = t % APTC_SPAN; c < APTC_TILE; c += APTC_SPAN) {
                const bool sees = k0 + c < limit;
                const float product = sees ? aptc_dot(q + r * job.dim, kv + c * job.dim, job.dim) : 0.0f;
                s[r * (APTC_TILE + 1) + c] = sees ? aptc_logit(&job, &p, q0 + r, k0 + c, product) : -INFINITY;
            }
        }
        APTC_BARRIER;
        APTC_THREADS(t) if (t < APTC_TILE) {
            float *row = s + t * (APTC_TILE + 1), top = max[t], total = 0;
            for (int32_t c = 0; c < APTC_TILE; c++) top = fmaxf(top, row[c]);
            for (int32_t c = 0; c < APTC_TILE; c++) {
                row[c] = row[c] == -INFINITY ? 0.0f : expf(row[c] - top);      /* a NaN stays one */
                total += row[c];
            }
            shrink[t] = top > -INFINITY ? expf(max[t] - top) : 1.0f;
            sum[t] = sum[t] * shrink[t] + total;
            max[t] = top;
        }
        APTC_LOAD_TILE(kv, job.v, job.ldv, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
        APTC_BARRIER;
        APTC_THREADS(t) for (int32_t e = t; e < APTC_TILE * job.dim; e += APTC_BLOCK) {
            const int32_t r = e / job.dim, c = e % job.dim;
            float total = acc[e] * shrink[r];
            for (int32_t k = 0; k < APTC_TILE; k++) total += s[r * (APTC_TILE + 1) + k] * kv[k * job.dim + c];
            acc[e] = total;
        }
    }
    APTC_BARRIER;
    APTC_THREADS(t) {
        const float mask = job.mask != NULL ? job.mask[p.group] : 1.0f;
        for (int32_t e = t; e < APTC_TILE * job.dim; e += APTC_BLOCK) {
            const int32_t r = e / job.dim, c = e % job.dim;
            if (q0 + r < p.queries)
                job.o[(p.q_row + q0 + r) * job.ldo + p.head * job.dim + c] = sum[r] != 0 ? acc[e] * (mask / sum[r]) : 0.0f;
        }
        if (job.lse_out != NULL && t < APTC_TILE && q0 + t < p.queries)
            job.lse_out[(p.q_row + q0 + t) * job.heads + p.head] = sum[t] != 0 ? max[t] + logf(sum[t]) : 0.0f;
    }
}
APTC_LAUNCHER(aptc_attention_forward_kernel, aptc_attention)

/* dot(rows, heads) = d_o . o of each query and head: a warp each */
APTC_KERNEL(aptc_attention_dot_kernel, aptc_attention)
{
    APTC_UNUSED_BY;
    APTC_PRIVATE(float, sum);
    APTC_THREADS(t) {
        const int64_t pair = APTC_BX * APTC_WARPS + t / APTC_WARP, row = pair / job.heads, column = pair % job.heads * job.dim;
        APTC_MINE(sum, t) = 0;
        for (int32_t c = t % APTC_WARP; pair < job.tiles && c < job.dim; c += APTC_WARP)
            APTC_MINE(sum, t) += job.d_o[row * job.lddq + column + c] * job.q[row * job.ldo + column + c];
    }
    APTC_WARP_SUM(sum);
    APTC_THREADS(t) {
        const int64_t pair = APTC_BX * APTC_WARPS + t / APTC_WARP;
        if (pair < job.tiles && t % APTC_WARP == 0) job.o[pair] = APTC_MINE(sum, t);
    }
}
APTC_LAUNCHER(aptc_attention_dot_kernel, aptc_attention)

/* P and dS of the tile at (q0, k0): q, k, v and d_o (times the head mask) are in tiles of the block. Thread as above. ds: dS, the
   gradient of the logits; where a query does not see a key both are 0. */
#define APTC_GRADIENT_TILE(p, prob, ds)                                                                                 \
    APTC_THREADS(t) {                                                                                                   \
        const int32_t r = t / APTC_SPAN;                                                                                \
        const bool inside = q0 + r < (p).queries;                                                                       \
        const int64_t limit = inside ? aptc_limit(&job, &(p), q0 + r) : 0;                                              \
        const float lse = inside ? job.lse[((p).q_row + q0 + r) * job.heads + (p).head] : 0.0f;                         \
        const float mean = inside && job.dot != NULL ? job.dot[((p).q_row + q0 + r) * job.heads + (p).head] : 0.0f;     \
        for (int32_t c = t % APTC_SPAN; c < APTC_TILE; c += APTC_SPAN) {                                                \
            const bool sees = k0 + c < limit;                                                                           \
            const float product = sees ? aptc_dot(q + r * job.dim, k + c * job.dim, job.dim) : 0.0f;                    \
            const float logit = sees ? aptc_logit(&job, &(p), q0 + r, k0 + c, product) : 0.0f;                          \
            const float pr = sees ? expf(logit - lse) : 0.0f;                                                           \
            const float dp = sees ? aptc_dot(d_o + r * job.dim, v + c * job.dim, job.dim) : 0.0f;                       \
            (prob)[r * (APTC_TILE + 1) + c] = pr;                                                                       \
            (ds)[r * (APTC_TILE + 1) + c] = pr * (dp - mean);                                                           \
        }                                                                                                               \
    }

#define APTC_GRADIENT_SHARED                                                                                            \
    APTC_DYNAMIC(float, room, APTC_ATTENTION_ROOM(APTC_HEAD_MAX));                                                      \
    float *q = room, *k = q + APTC_TILE * job.dim, *v = k + APTC_TILE * job.dim, *d_o = v + APTC_TILE * job.dim;        \
    float *prob = d_o + APTC_TILE * job.dim, *ds = prob + APTC_TILE * (APTC_TILE + 1)

/* dot by a sweep over the keys, dot_i = sum over j of P(i, j) dP(i, j) / sum over j of P(i, j). With it the rows of dS sum to 0
   up to the rounding of dS; d_o . o leaves the rounding of its own terms, which hides small gradients where values are nearly
   alike.
   Block: BX = tile of queries, BY = (sequence, head) */
APTC_KERNEL(aptc_attention_sweep_kernel, aptc_attention)
{
    APTC_GRADIENT_SHARED;
    APTC_SHARED(float, dot, APTC_TILE);
    APTC_SHARED(float, sum, APTC_TILE);
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * APTC_TILE, seen = aptc_limit(&job, &p, aptc_min(q0 + APTC_TILE, p.queries) - 1);
    const float mask = job.mask != NULL ? job.mask[p.group] : 1.0f;
    if (q0 >= p.queries) return;
    APTC_LOAD_TILE(q, job.q, job.ldq, p.q_row, p.head * job.dim, q0, p.queries, 1.0f);
    APTC_LOAD_TILE(d_o, job.d_o, job.ldo, p.q_row, p.head * job.dim, q0, p.queries, mask);
    APTC_THREADS(t) if (t < APTC_TILE) dot[t] = sum[t] = 0;
    for (int64_t k0 = 0; k0 < seen; k0 += APTC_TILE) {
        APTC_BARRIER;
        APTC_LOAD_TILE(k, job.k, job.ldk, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
        APTC_LOAD_TILE(v, job.v, job.ldv, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
        APTC_BARRIER;
        APTC_GRADIENT_TILE(p, prob, ds)
        APTC_BARRIER;
        APTC_THREADS(t) for (int32_t c = 0; t < APTC_TILE && c < APTC_TILE; c++) {
            dot[t] += ds[t * (APTC_TILE + 1) + c];
            sum[t] += prob[t * (APTC_TILE + 1) + c];
        }
    }
    APTC_THREADS(t) if (t < APTC_TILE && q0 + t < p.queries)
        job.o[(p.q_row + q0 + t) * job.heads + p.head] = sum[t] > 0 ? dot[t] / sum[t] : dot[t];
}
APTC_LAUNCHER(aptc_attention_sweep_kernel, aptc_attention)

/* Block: BX = tile of queries, BY = (sequence, head) */
APTC_KERNEL(aptc_attention_dq_kernel, aptc_attention)
{
    APTC_GRADIENT_SHARED;
    APTC_PRIVATE_ARRAY(float, acc, APTC_TILE * APTC_HEAD_MAX / APTC_BLOCK);
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t q0 = APTC_BX * APTC_TILE, seen = aptc_limit(&job, &p, aptc_min(q0 + APTC_TILE, p.queries) - 1);
    const float mask = job.mask != NULL ? job.mask[p.group] : 1.0f;
    if (q0 >= p.queries) return;
    APTC_LOAD_TILE(q, job.q, job.ldq, p.q_row, p.head * job.dim, q0, p.queries, 1.0f);
    APTC_LOAD_TILE(d_o, job.d_o, job.ldo, p.q_row, p.head * job.dim, q0, p.queries, mask);
    APTC_THREADS(t) for (int32_t e = t, n = 0; e < APTC_TILE * job.dim; e += APTC_BLOCK, n++) APTC_MINE(acc, t)[n] = 0;
    for (int64_t k0 = 0; k0 < seen; k0 += APTC_TILE) {
        APTC_BARRIER;
        APTC_LOAD_TILE(k, job.k, job.ldk, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
        APTC_LOAD_TILE(v, job.v, job.ldv, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
        APTC_BARRIER;
        APTC_GRADIENT_TILE(p, prob, ds)
        APTC_BARRIER;
        APTC_THREADS(t) for (int32_t e = t, n = 0; e < APTC_TILE * job.dim; e += APTC_BLOCK, n++) {
            const int32_t r = e / job.dim, c = e % job.dim;
            float total = APTC_MINE(acc, t)[n];
            for (int32_t x = 0; x < APTC_TILE; x++) total += ds[r * (APTC_TILE + 1) + x] * k[x * job.dim + c];
            APTC_MINE(acc, t)[n] = total;
        }
    }
    APTC_THREADS(t) for (int32_t e = t, n = 0; e < APTC_TILE * job.dim; e += APTC_BLOCK, n++) {
        const int32_t r = e / job.dim, c = e % job.dim;
        if (q0 + r < p.queries) job.dq[(p.q_row + q0 + r) * job.lddq + p.head * job.dim + c] = job.scale * APTC_MINE(acc, t)[n];
    }
}
APTC_LAUNCHER(aptc_attention_dq_kernel, aptc_attention)

/* Block: BX = tile of keys, BY = (sequence, key head) */
APTC_KERNEL(aptc_attention_dkv_kernel, aptc_attention)
{
    APTC_GRADIENT_SHARED;
    APTC_PRIVATE_ARRAY(float, acc_k, APTC_TILE * APTC_HEAD_MAX / APTC_BLOCK);
    APTC_PRIVATE_ARRAY(float, acc_v, APTC_TILE * APTC_HEAD_MAX / APTC_BLOCK);
    const int32_t groups = job.heads / job.share, group = (int32_t)(APTC_BY % groups);
    aptc_place p = aptc_place_of(&job, APTC_BY / groups, group * job.share);
    const int64_t k0 = APTC_BX * APTC_TILE;
    const float mask = job.mask != NULL ? job.mask[group] : 1.0f;
    if (k0 >= p.keys) return;
    APTC_LOAD_TILE(k, job.k, job.ldk, p.k_row, group * job.dim, k0, p.keys, 1.0f);
    APTC_LOAD_TILE(v, job.v, job.ldv, p.k_row, group * job.dim, k0, p.keys, 1.0f);
    APTC_THREADS(t) for (int32_t e = t, n = 0; e < APTC_TILE * job.dim; e += APTC_BLOCK, n++)
        APTC_MINE(acc_k, t)[n] = APTC_MINE(acc_v, t)[n] = 0;
    for (int32_t h = 0; h < job.share; h++) {
        p.head = group * job.share + h;
        for (int64_t q0 = 0; q0 < p.queries; q0 += APTC_TILE) {
            if (aptc_limit(&job, &p, aptc_min(q0 + APTC_TILE, p.queries) - 1) <= k0) continue;
            APTC_BARRIER;
            APTC_LOAD_TILE(q, job.q, job.ldq, p.q_row, p.head * job.dim, q0, p.queries, 1.0f);
            APTC_LOAD_TILE(d_o, job.d_o, job.ldo, p.q_row, p.head * job.dim, q0, p.queries, mask);
            APTC_BARRIER;
            APTC_GRADIENT_TILE(p, prob, ds)
            APTC_BARRIER;
            APTC_THREADS(t) for (int32_t e = t, n = 0; e < APTC_TILE * job.dim; e += APTC_BLOCK, n++) {
                const int32_t r = e / job.dim, c = e % job.dim;
                float dk = APTC_MINE(acc_k, t)[n], dv = APTC_MINE(acc_v, t)[n];
                for (int32_t x = 0; x < APTC_TILE; x++) {
                    dk += ds[x * (APTC_TILE + 1) + r] * q[x * job.dim + c];
                    dv += prob[x * (APTC_TILE + 1) + r] * d_o[x * job.dim + c];
                }
                APTC_MINE(acc_k, t)[n] = dk;
                APTC_MINE(acc_v, t)[n] = dv;
            }
        }
    }
    APTC_THREADS(t) for (int32_t e = t, n = 0; e < APTC_TILE * job.dim; e += APTC_BLOCK, n++) {
        const int64_t r = p.k_row + k0 + e / job.dim, column = group * job.dim + e % job.dim;
        if (k0 + e / job.dim >= p.keys) continue;
        if (job.dk != NULL) job.dk[r * job.lddk + column] = job.scale * APTC_MINE(acc_k, t)[n];
        if (job.dv != NULL) job.dv[r * job.lddv + column] = APTC_MINE(acc_v, t)[n];
    }
}
APTC_LAUNCHER(aptc_attention_dkv_kernel, aptc_attention)

/* Block: BY = (sequence, head): its row of dbias, tile after tile; thread u of a tile takes the diagonal u */
APTC_KERNEL(aptc_attention_dbias_kernel, aptc_attention)
{
    APTC_UNUSED_BX;
    APTC_GRADIENT_SHARED;
    const aptc_place p = aptc_place_of(&job, APTC_BY / job.heads, (int32_t)(APTC_BY % job.heads));
    const int64_t wide = 2 * (int64_t)job.span - 1;
    const float mask = job.mask != NULL ? job.mask[p.group] : 1.0f;
    float *out = job.dbias + APTC_BY * wide;
    APTC_THREADS(t) for (int64_t u = t; u < wide; u += APTC_BLOCK) out[u] = 0;
    for (int64_t q0 = 0; q0 < p.queries; q0 += APTC_TILE) {
        APTC_BARRIER;
        APTC_LOAD_TILE(q, job.q, job.ldq, p.q_row, p.head * job.dim, q0, p.queries, 1.0f);
        APTC_LOAD_TILE(d_o, job.d_o, job.ldo, p.q_row, p.head * job.dim, q0, p.queries, mask);
        for (int64_t k0 = 0; k0 < p.keys; k0 += APTC_TILE) {
            APTC_BARRIER;
            APTC_LOAD_TILE(k, job.k, job.ldk, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
            APTC_LOAD_TILE(v, job.v, job.ldv, p.k_row, p.group * job.dim, k0, p.keys, 1.0f);
            APTC_BARRIER;
            APTC_GRADIENT_TILE(p, prob, ds)
            APTC_BARRIER;
            APTC_THREADS(t) if (t < 2 * APTC_TILE - 1) {          /* key - query = k0 - q0 + u - (APTC_TILE - 1) */
                float total = 0;
                for (int32_t r = 0; r < APTC_TILE; r++) {
                    const int32_t c = r + t - (APTC_TILE - 1);
                    if (c >= 0 && c < APTC_TILE) total += ds[r * (APTC_TILE + 1) + c];
                }
                prob[t] = total;
            }
            APTC_BARRIER;
            /* Far diagonals share the last entries of the table: those are added by one thread, in order. */
            APTC_THREADS(t) {
                const int64_t last = job.span - 1, d0 = k0 - q0 - p.shift - (APTC_TILE - 1);
                const int64_t distance = d0 + t;
                if (t < 2 * APTC_TILE - 1 && distance > -last && distance < last) out[distance + last] += prob[t];
                for (int32_t u = 0; t == 0 && u < 2 * APTC_TILE - 1; u++) {
                    if (d0 + u <= -last) out[0] += prob[u];
                    else if (d0 + u >= last) out[wide - 1] += prob[u];
                }
            }
        }
    }
}
APTC_LAUNCHER(aptc_attention_dbias_kernel, aptc_attention)

static aptc_attention aptc_attention_of(const apti_attention_job *op)
{
    const apti_attention_op *o = op->op;
    aptc_attention a;
    memset(&a, 0, sizeof a);
    a.q = op->q;
    a.k = op->k;
    a.v = op->v;
    a.ldq = op->ldq;
    a.ldk = op->ldk;
    a.ldv = op->ldv;
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
    return a;
}

static bool aptc_attention_forward_op(aptc_device *d, const apti_attention_job *op)
{
    aptc_attention a = aptc_attention_of(op);
    if (a.dim > APTC_HEAD_MAX || (int64_t)a.sequences * a.heads > 65535) return false;
    a.o = op->out;
    a.ldo = op->ldo;
    a.lse_out = op->lse;
    APTC_LAUNCH_DYNAMIC(d, aptc_attention_forward_kernel, a, aptc_ceil(op->longest_q, APTC_TILE), (int64_t)a.sequences * a.heads,
                        APTC_ATTENTION_ROOM(a.dim) * 4);
    return true;
}

/* dot(rows, heads) of the backward */
static void aptc_attention_dots(aptc_device *d, const apti_attention_job *op, const aptc_attention *given, float *dot)
{
    aptc_attention a = *given;
    a.o = dot;
    a.dot = NULL;
    if (op->o == NULL || d->math == APT_CUDA_FP32) {
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_sweep_kernel, a, aptc_ceil(op->longest_q, APTC_TILE),
                            (int64_t)a.sequences * a.heads, APTC_ATTENTION_ROOM(a.dim) * 4);
        return;
    }
    a.q = op->o;                      /* this kernel's two matrices are d_o and o */
    a.ldo = op->ldo;
    a.lddq = op->lddo;
    a.tiles = op->rows_q * a.heads;
    APTC_LAUNCH(d, aptc_attention_dot_kernel, a, aptc_ceil(a.tiles, APTC_WARPS), 1);
}

static bool aptc_attention_backward_op(aptc_device *d, const apti_attention_job *op)
{
    aptc_attention a = aptc_attention_of(op);
    const int64_t pairs = (int64_t)a.sequences * a.heads, wide = 2 * (int64_t)a.span - 1, bytes = APTC_ATTENTION_ROOM(a.dim) * 4;
    if (a.dim > APTC_HEAD_MAX || pairs > 65535) return false;
    float *dot = (float *)aptc_take(d, op->rows_q * a.heads * (int64_t)sizeof(float));
    a.dbias = op->dbias == NULL ? NULL : (float *)aptc_take(d, pairs * wide * (int64_t)sizeof(float));
    if (dot == NULL || (op->dbias != NULL && a.dbias == NULL)) return false;
    a.d_o = op->d_o;
    a.ldo = op->lddo;
    a.lse = op->saved;
    a.dq = op->dq;
    a.dk = op->dk;
    a.dv = op->dv;
    a.lddq = op->lddq;
    a.lddk = op->lddk;
    a.lddv = op->lddv;
    aptc_attention_dots(d, op, &a, dot);
    a.dot = dot;
    if (op->dq != NULL) APTC_LAUNCH_DYNAMIC(d, aptc_attention_dq_kernel, a, aptc_ceil(op->longest_q, APTC_TILE), pairs, bytes);
    if (op->dk != NULL || op->dv != NULL)
        APTC_LAUNCH_DYNAMIC(d, aptc_attention_dkv_kernel, a, aptc_ceil(op->longest_k, APTC_TILE), pairs / a.share, bytes);
    if (op->dbias == NULL) return true;
    const aptc_fold fold = {op->dbias, a.dbias, NULL, a.sequences, a.heads * wide, a.heads * wide, false};
    APTC_LAUNCH_DYNAMIC(d, aptc_attention_dbias_kernel, a, 1, pairs, bytes);
    APTC_LAUNCH_VECTOR(d, aptc_fold_kernel, fold, fold.n);
    return true;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Products
   ------------------------------------------------------------------------------------------------------------------ */

/* One operand of a product. */
typedef struct aptc_operand {
    const void *data;
    apt_dtype type;
    int64_t ld;
    bool transposed;                  /* A: (k, m) in memory; B: (n, k) in memory */
} aptc_operand;

/* c(m, n) = a b [+ c] [+ bias], all row-major. */
typedef struct aptc_product {
    aptc_operand a, b;
    float *c;
    const float *bias;
    int64_t m, n, k, ldc;
    bool accumulate;
} aptc_product;

#ifdef APT_CUDA_EMULATE
/* Block: row BX */
APTC_KERNEL(aptc_product_kernel, aptc_product)
{
    const int64_t i = APTC_BX;
    APTC_UNUSED_BY;
    for (int64_t j = 0; j < job.n; j++) {
        double sum = job.accumulate ? (double)job.c[i * job.ldc + j] : 0.0;
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
    key.form = 1 | p->a.transposed << 1 | p->b.transposed << 2 | (p->bias != NULL) << 3 | p->accumulate << 4 |
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

static void aptc_product_run(aptc_device *d, const aptc_product *p)
{
    const float one = 1, beta = p->accumulate ? 1.0f : 0.0f;
    aptc_blas x;
    memset(&x, 0, sizeof x);
    aptc_blas_make(d, &x, p);
    const cublasLtMatmulAlgo_t *algorithm = d->result == APT_OK ? aptc_blas_algorithm(d, &x, p) : NULL;
    if (algorithm != NULL)
        aptc_blas_check(d, cublasLtMatmul(d->blas, x.desc, &one, p->b.data, x.a, p->a.data, x.b, &beta, p->c, x.c, p->c, x.c,
                                          algorithm, d->blas_work, d->blas_bytes, d->stream), "cublasLtMatmul");
    aptc_blas_free(&x);
}
#endif

/* An operand (rows, cols in memory) in the type that the product computes in: as it is, or converted into the workspace. NULL
   data: no room. */
static aptc_operand aptc_convert(aptc_device *d, aptc_operand x, int64_t rows, int64_t cols, apt_dtype type)
{
    if (x.type == type) return x;
    const int64_t ld = (cols + 7) / 8 * 8;
    aptc_cast job = {NULL, x.data, ld, x.ld, rows, cols, type, x.type};
    job.to = aptc_take(d, rows * ld * aptc_size(type));
    if (job.to != NULL) APTC_LAUNCH_EACH(d, aptc_cast_kernel, job);
    x.data = job.to;
    x.type = type;
    x.ld = ld;
    return x;
}

static aptc_operand aptc_left(const apti_gemm_part *part)
{
    aptc_operand x = {part->a, APT_F32, part->a_row, false};
    if (part->a_col != 1) {
        x.ld = part->a_col;
        x.transposed = true;
    }
    return x;
}

static aptc_operand aptc_right(const apti_gemm_part *part)
{
    const bool packed = part->kind == APTI_B_PACKED || part->kind == APTI_B_PACKED_T;
    aptc_operand x = {packed ? part->packed->data : part->b, packed ? part->packed->type : APT_F32,
                      packed ? part->packed->k : part->ldb, part->kind == APTI_B_PACKED || part->kind == APTI_B_PLAIN_T};
    return x;
}

static int64_t aptc_bytes(int64_t rows, int64_t cols) { return (rows * ((cols + 7) / 8 * 8) * 4 + 255) / 256 * 256; }

/* One part of a product. Where the workspace cannot take the whole of an operand, the reduction or the rows are cut. */
static bool aptc_part_run(aptc_device *d, const apti_gemm *g, const apti_gemm_part *part, float *c, int64_t ldc, bool accumulate,
                          const float *bias)
{
    const apt_dtype type = d->math == APT_CUDA_BF16 ? APT_BF16 : d->math == APT_CUDA_FP16 ? APT_F16 : APT_F32;
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
    for (int64_t p0 = 0; p0 < part->k; p0 += step_k) {
        const int64_t k = aptc_min(step_k, part->k - p0), size = aptc_size(b.type);
        aptc_operand right = b;
        right.data = (const char *)b.data + (b.transposed ? p0 : p0 * b.ld) * size;
        right = aptc_convert(d, right, b.transposed ? g->n : k, b.transposed ? k : g->n, type);
        const size_t beside = d->used;
        for (int64_t i0 = 0; i0 < g->m; i0 += step_m) {
            const int64_t m = aptc_min(step_m, g->m - i0);
            aptc_operand left = a;
            left.data = (const float *)a.data + (a.transposed ? p0 * a.ld + i0 : i0 * a.ld + p0);
            left = aptc_convert(d, left, a.transposed ? k : m, a.transposed ? m : k, type);
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
    aptc_finish f = {g->c, NULL, z, onto ? NULL : g->residual, g->mask, g->ldc, 0, ldz, g->ld_residual, g->m, g->n, g->act};
    if (!more && biased) aptc_start(d, g, z, ldz);
    if (!biased && !more) aptc_start(d, g, z, ldz);
    else if (!biased) {                           /* an empty product onto c, with a bias: as a residual of one row */
        const apti_residual_job job = {NULL, z, z, g->bias, NULL, ldz, ldz, 0, g->m, g->n, 0};
        APTC_LAUNCH_EACH(d, aptc_residual_kernel, job);
    }
    if (g->pre != NULL || g->act >= 0 || f.residual != NULL || g->mask != NULL) APTC_LAUNCH_EACH(d, aptc_finish_kernel, f);
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
   The backend
   ------------------------------------------------------------------------------------------------------------------ */

static bool aptc_run(void *self, apti_op op, const void *job)
{
    aptc_device *d = (aptc_device *)self;
    d->used = 0;
    aptc_enter(d);
    switch (op) {
    case APTI_OP_GEMM: return aptc_gemm_op(d, (const apti_gemm *)job);
    case APTI_OP_PACK: return aptc_pack_op(d, (const apti_pack_job *)job);
    case APTI_OP_COPY: APTC_LAUNCH_EACH(d, aptc_copy_kernel, *(const apti_copy_job *)job); return true;
    case APTI_OP_SCALE:
        APTC_LAUNCH_VECTOR(d, aptc_scale_kernel, *(const apti_scale_job *)job, ((const apti_scale_job *)job)->n);
        return true;
    case APTI_OP_COLUMN: return aptc_column_op(d, (const apti_column_job *)job);
    case APTI_OP_NORM_FORWARD: return aptc_norm_forward_op(d, (const apti_norm_job *)job);
    case APTI_OP_NORM_BACKWARD: return aptc_norm_backward_op(d, (const apti_norm_job *)job);
    case APTI_OP_ROTARY_TABLE: return aptc_rotary_op(d, (const apti_rotary_job *)job, true);
    case APTI_OP_ROTARY: return aptc_rotary_op(d, (const apti_rotary_job *)job, false);
    case APTI_OP_RELATIVE_FORWARD: return aptc_relative_op(d, (const apti_relative_job *)job, false);
    case APTI_OP_RELATIVE_BACKWARD: return aptc_relative_op(d, (const apti_relative_job *)job, true);
    case APTI_OP_ATTENTION_FORWARD: return aptc_attention_forward_op(d, (const apti_attention_job *)job);
    case APTI_OP_ATTENTION_BACKWARD: return aptc_attention_backward_op(d, (const apti_attention_job *)job);
    case APTI_OP_ACT_BACKWARD: APTC_LAUNCH_EACH(d, aptc_act_backward_kernel, *(const apti_act_job *)job); return true;
    case APTI_OP_RESIDUAL: APTC_LAUNCH_EACH(d, aptc_residual_kernel, *(const apti_residual_job *)job); return true;
    case APTI_OP_GATE_FORWARD: APTC_LAUNCH_EACH(d, aptc_gate_forward_kernel, *(const apti_gate_job *)job); return true;
    case APTI_OP_GATE_BACKWARD: APTC_LAUNCH_EACH(d, aptc_gate_backward_kernel, *(const apti_gate_job *)job); return true;
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
    case APTI_OP_ADAM:
        APTC_LAUNCH_VECTOR(d, aptc_adam_kernel, *(const apti_adam_job *)job, ((const apti_adam_job *)job)->n);
        return true;
    case APTI_OP_CUT: return aptc_cut_op(d, (const apti_cut_job *)job);
    case APTI_OP_COUNT: default: return false;
    }
}

static apt_result aptc_sync(void *self, char message[APTI_BACKEND_MESSAGE])
{
    aptc_device *d = (aptc_device *)self;
    aptc_enter(d);
#ifdef APT_CUDA_EMULATE
    for (int32_t i = 0; i < d->queued; i++) d->queue[i].run(d->queue[i].job.bytes, d->queue[i].bx, d->queue[i].by);
    d->queued = 0;
#else
    aptc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize");
#endif
    const apt_result r = d->result;
    memcpy(message, d->message, sizeof d->message);
    d->result = APT_OK;
    return r;
}

static void *aptc_alloc(void *self, size_t bytes)
{
    const apt_cuda_desc *desc = &((aptc_device *)self)->desc;
    if (desc->alloc != NULL) return desc->alloc(bytes, desc->alloc_user);
    aptc_enter((const aptc_device *)self);
#ifdef APT_CUDA_EMULATE
    return malloc(bytes);
#else
    void *p = NULL;
    if (cudaMallocManaged(&p, bytes, cudaMemAttachGlobal) == cudaSuccess) return p;
    (void)cudaGetLastError();         /* no memory is not a failure of the device */
    return NULL;
#endif
}

static void aptc_release(void *self, void *memory)
{
    const apt_cuda_desc *desc = &((aptc_device *)self)->desc;
    if (desc->release != NULL) {
        desc->release(memory, desc->alloc_user);
        return;
    }
#ifdef APT_CUDA_EMULATE
    free(memory);
#else
    (void)cudaFree(memory);
#endif
}

/* The workspace: what the caller gives, or memory that only the device can address. */
static void aptc_work_open(aptc_device *d)
{
    const size_t align = 256, bytes = d->work_bytes + align;
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
    d->work = (char *)d->block + (align - (uintptr_t)d->block % align) % align;
    d->backend.workspace = (int64_t)bytes;
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
    free(d);
}

#ifdef APT_CUDA_EMULATE
static void aptc_device_start(aptc_device *d, const apt_cuda_desc *desc)
{
    (void)desc;
    aptc_work_open(d);
}
#else
static void aptc_device_start(aptc_device *d, const apt_cuda_desc *desc)
{
    int managed = 0;
    d->device = desc->device;
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
    void (*const attention[])(aptc_attention) = {aptc_attention_forward_kernel, aptc_attention_dq_kernel,
                                                 aptc_attention_sweep_kernel, aptc_attention_dkv_kernel,
                                                 aptc_attention_dbias_kernel};
    for (size_t i = 0; i < sizeof attention / sizeof *attention; i++)
        aptc_check(d, cudaFuncSetAttribute(attention[i], cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           APTC_ATTENTION_ROOM(APTC_HEAD_MAX) * (int)sizeof(float)), "attention");
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
    aptc_device_start(d, &desc);
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
