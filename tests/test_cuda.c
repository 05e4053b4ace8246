/* apt_cuda.h on its emulated device: whole runs beside those of the CPU, resumption from one on the other, products and attention in
   bfloat16 and float16, with a small workspace, operands that are converted once, matrices held in bfloat16, sums inside other launches, launches as graphs,
   runs with a loss scale, compaction, estimates of memory and its limit, what a context with a device refuses, and what
   apt_cuda_open refuses. Single operations and the golden models run on the same emulation in the build "emulated" of tests/run.sh.
   build: cc -std=c11 -O2 tests/test_cuda.c -o test_cuda -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"
#include "train_test.h"
#if !defined(APT_CUDA_IMPLEMENTATION) && !defined(APT_TEST_DEVICE)
#define APT_CUDA_IMPLEMENTATION
#define APT_CUDA_EMULATE
#include "../apt_cuda.h"
#endif

static apt_ctx *device_context(const apt_cuda_desc *given)
{
    char message[APTI_BACKEND_MESSAGE] = "";
    apt_cuda_desc device = APT_ZERO;
    apt_desc desc = APT_ZERO;
    if (given != NULL) device = *given;
    else device.workspace_bytes = (size_t)16 << 20;
    desc.threads = 1;
    desc.backend = apt_cuda_open(&device, message, sizeof message);
    if (desc.backend == NULL) fail_msg("%s", message);
    apt_ctx *ctx = (apt_create)(&desc);          /* in brackets: not the one of apt_test.h that adds a device */
    assert_non_null(ctx);
    return ctx;
}

/* Of a device's launches: all, and those that graphs have made. Only the emulated device counts. */
static void count_launches(const apt_ctx *ctx, int64_t count[2])
{
#if defined(APT_TEST_DEVICE)
    (void)ctx;
    count[0] = count[1] = 0;
#else
    const aptc_device *d = (const aptc_device *)ctx->desc.backend->self;
    count[0] = d->launched;
    count[1] = d->replayed;
#endif
}

static void expect_launches(const char *what, int64_t count, int64_t wanted)
{
#if defined(APT_TEST_DEVICE)
    (void)what, (void)count, (void)wanted;
#else
    if (count != wanted) fail_msg("%s: %d launches, expected %d", what, (int)count, (int)wanted);
#endif
}

/* A run with its trace, in a context of its own. */
static void begin_in(live *l, const plan *p, apt_ctx *ctx)
{
    memset(l, 0, sizeof *l);
    assert_non_null(ctx);
    l->ctx = ctx;
    l->model = test_model(l->ctx, &p->c, 1);
    apt_train_desc d = p->d;
    d.on_event = on_event;
    d.user = &l->tr;
    l->trainer = test_trainer(l->model, &d);
}

static void begin(live *l, const plan *p, bool device)
{
    const apt_desc desc = {.threads = 1};
    begin_in(l, p, device ? device_context(NULL) : (apt_create)(&desc));
}

static void assert_close_traces(const trace *a, const trace *b, int64_t from, int64_t to, const char *what)
{
    for (int64_t i = from; i < to; i++) {
        if (fabs(a->loss[i] - b->loss[i]) > 1e-3 * (1 + fabs(a->loss[i])))
            fail_msg("%s: micro-batch %d has loss %.9g on the device, %.9g on the CPU", what, (int)i, b->loss[i], a->loss[i]);
        if (a->events[i] != b->events[i])
            fail_msg("%s: micro-batch %d has events %x, %x on the CPU", what, (int)i, b->events[i], a->events[i]);
    }
}

static void assert_same_shapes(const apt_model *a, const apt_model *b)
{
    assert_int_equal(a->config.hidden, b->config.hidden);
    for (int32_t l = 0; l < a->config.layers; l++) {
        assert_int_equal(a->shape[l].heads, b->shape[l].heads);
        assert_int_equal(a->shape[l].neurons, b->shape[l].neurons);
    }
}

static plan plan_at(int32_t which)
{
    plan p = which == 0   ? apt_plan(APT_BERT, APT_TASK_CLASSIFY)
             : which == 1 ? apt_plan(APT_ROBERTA, APT_TASK_SPAN)
                          : apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    if (which < 2) return p;
    p.c = test_decoder(which - 2);
    p.c.neurons = 20;
    return p;
}

/* Everything that operations read or write lies where the device can reach it. */
static void assert_on_device(const apt_model *m)
{
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        const void *const blocks[] = {p->value, p->grad, p->moment1, p->moment2, p->packed.data, p->columns};
        for (size_t k = 0; k < sizeof blocks / sizeof blocks[0]; k++)
            if (blocks[k] != NULL && apti_block_of(blocks[k])->backend != m->ctx->desc.backend)
                fail_msg("array %d of %s is the CPU's own", (int)k, p->name);
    }
}

/* The same decisions, losses within a thousandth: pruning, growth, teachers, accumulation, compaction and all. Twice on the
   device: the same bits. */
static void test_same_run(void **state)
{
    (void)state;
    for (int32_t which = 0; which < 2 + TEST_DECODERS; which++) {
        const plan p = plan_at(which);
        live cpu, device, again;
        begin(&cpu, &p, false);
        begin(&device, &p, true);
        begin(&again, &p, true);
        run(cpu.trainer, &p, &cpu.tr, 0, micro_batches(&p));
        run(device.trainer, &p, &device.tr, 0, micro_batches(&p));
        run(again.trainer, &p, &again.tr, 0, micro_batches(&p));
        assert_ok(cpu.ctx, apt_trainer_finish(cpu.trainer));
        assert_ok(device.ctx, apt_trainer_finish(device.trainer));
        assert_ok(again.ctx, apt_trainer_finish(again.trainer));
        assert_close_traces(&cpu.tr, &device.tr, 0, micro_batches(&p), "beside the CPU");
        assert_same_shapes(cpu.model, device.model);
        assert_true(cpu.model->shape[0].neurons < p.c.neurons);
        assert_on_device(device.model);
        assert_int_equal(device.ctx->fallbacks >> APTI_OP_CUT & 1, 0);
        assert_same_trace(&device.tr, &again.tr, 0, micro_batches(&p), "twice");
        assert_true(test_model_sum(device.model) == test_model_sum(again.model));
        apt_destroy(cpu.ctx);
        apt_destroy(device.ctx);
        apt_destroy(again.ctx);
    }
}

/* Half of all units go, but no layer loses its first head, nor the model its first dimension. */
static void mask_half(apt_model *m, uint64_t seed)
{
    apt_units u;
    float masks[512];
    apt_rng rng = apt_rng_make(seed, 0);
    apt_model_units(m, &u);
    assert_true(u.total <= 512);
    for (int32_t i = 0; i < u.total; i++) masks[i] = apt_rng_below(&rng, 2) != 0 ? 1.0f : 0.0f;
    for (int32_t l = 0; l < m->config.layers; l++) masks[apti_unit_head(m, l)] = 1;
    masks[apti_unit_hidden(m)] = 1;
    assert_ok(m->ctx, apt_model_set_masks(m, masks, u.total));
}

/* Weights in float32 or bfloat16, trained (then with gradients and moments) or frozen. */
static apt_model *cut_model(apt_ctx *ctx, const apt_config *c, apt_dtype weights, const apt_train_desc *d)
{
    apt_model *m = NULL;
    apt_rng rng = apt_rng_make(8, 0);
    assert_ok(ctx, apti_model_build(ctx, c, 5, weights, &m));
    if (d != NULL) (void)test_trainer(m, d);
    apti_sync(ctx);
    for (int32_t i = 0; i < m->param_count; i++) {
        float *const kept[] = {m->params[i].grad, m->params[i].moment1, m->params[i].moment2};
        for (int32_t k = 0; k < 3 && kept[0] != NULL; k++)
            for (int64_t j = 0; j < apti_param_count(&m->params[i]); j++) kept[k][j] = apt_rng_normal(&rng);
    }
    return m;
}

static void assert_same_arrays(const apt_model *a, const apt_model *b)
{
    assert_true(test_model_sum(a) == test_model_sum(b));
    for (int32_t i = 0; i < a->param_count; i++) {
        const apti_param *p = &a->params[i], *q = &b->params[i];
        const size_t bytes = (size_t)apti_param_count(p) * sizeof(float);
        assert_true((p->grad == NULL) == (q->grad == NULL));
        if (p->grad == NULL || bytes == 0) continue;
        if (memcmp(p->grad, q->grad, bytes) != 0 || memcmp(p->moment1, q->moment1, bytes) != 0 || memcmp(p->moment2, q->moment2, bytes) != 0)
            fail_msg("%s: other gradients or moments", p->name);
    }
}

/* Compaction on the device leaves the bits that the CPU leaves, in memory of its own. */
static void test_compaction(void **state)
{
    (void)state;
    for (int32_t which = 0; which < 2 * (2 + TEST_DECODERS); which++) {
        const plan p = plan_at(which / 2);
        apt_ctx *cpu = (apt_create)(NULL), *ctx = device_context(NULL);
        apt_train_desc d = p.d;
        d.method = which % 4 == 0 ? APT_METHOD_FULL : APT_METHOD_LORA;
        const apt_train_desc *trained = which % 2 == 0 ? &d : NULL;
        static const apt_dtype types[3] = {APT_F32, APT_BF16, APT_F16};
        for (int32_t k = 0; k < 3; k++) {
            apt_model *a = cut_model(cpu, &p.c, types[k], trained);
            apt_model *b = cut_model(ctx, &p.c, types[k], trained);
            mask_half(a, (uint64_t)which);
            mask_half(b, (uint64_t)which);
            const int64_t held = apt_memory_info(ctx).bytes;
            assert_ok(cpu, apt_model_compact(a));
            assert_ok(ctx, apt_model_compact(b));
            assert_true(b->config.hidden < p.c.hidden && apt_memory_info(ctx).bytes < held);
            assert_same_arrays(a, b);
            assert_on_device(b);
        }
        assert_int_equal(ctx->fallbacks >> APTI_OP_CUT & 1, 0);
        apt_destroy(cpu);
        apt_destroy(ctx);
    }
}

/* Where memory runs out in the middle of it, the CPU does the rest inside the old arrays. */
static void test_compaction_memory(void **state)
{
    (void)state;
#if !defined(APT_TEST_DEVICE)
    const plan p = plan_at(0);
    apt_train_desc d = p.d;
    apt_ctx *cpu = (apt_create)(NULL);
    d.method = APT_METHOD_FULL;
    apt_model *whole = cut_model(cpu, &p.c, APT_F32, &d);
    mask_half(whole, 1);
    assert_ok(cpu, apt_model_compact(whole));
    int32_t done = 0;
    for (int32_t fail = 0; fail < 40; fail += 3) {
        test_memory memory = {0, 0, -1, false, false};
        apt_cuda_desc device = APT_ZERO;
        device.workspace_bytes = (size_t)8 << 20;
        device.alloc = test_alloc;
        device.release = test_release;
        device.alloc_user = &memory;
        apt_ctx *ctx = device_context(&device);
        apt_model *m = cut_model(ctx, &p.c, APT_F32, &d);
        mask_half(m, 1);
        const uint64_t before = test_model_sum(m);
        memory.fail_at = memory.calls + fail;
        const apt_result r = apt_model_compact(m);
        if (r == APT_OK) assert_same_arrays(whole, m);
        else assert_true(r == APT_E_MEMORY && test_model_sum(m) == before);
        done += r == APT_OK && memory.failed;
        assert_on_device(m);
        apt_destroy(ctx);
        assert_int_equal(memory.live, 0);
    }
    assert_true(done > 5);
    apt_destroy(cpu);
#else
    test_skip("a device's memory does not run out on demand");
#endif
}

/* A checkpoint of the one goes on on the other. */
static void test_across(void **state)
{
    (void)state;
    const plan p = plan_at(0);
    const int64_t cuts[] = {3, 20, 33};
    char dir[512], path[600];
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "run.apt");
    live whole;
    begin(&whole, &p, false);
    run(whole.trainer, &p, &whole.tr, 0, micro_batches(&p));
    for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++)
        for (int from_device = 0; from_device < 2; from_device++) {
            live first, second;
            begin(&first, &p, from_device == 1);
            run(first.trainer, &p, &first.tr, 0, cuts[c]);
            assert_ok(first.ctx, apt_checkpoint_save(first.trainer, path, NULL, 0));
            apt_destroy(first.ctx);
            begin(&second, &p, from_device == 0);
            assert_ok(second.ctx, apt_checkpoint_load(second.trainer, path, NULL, NULL));
            run(second.trainer, &p, &second.tr, cuts[c], micro_batches(&p));
            assert_close_traces(&whole.tr, &second.tr, cuts[c], micro_batches(&p), "across");
            apt_destroy(second.ctx);
        }
    apt_destroy(whole.ctx);
    test_remove(dir);
}

/* float16 as apt.h has it: every half, and floats around all of them. */
static void test_float16(void **state)
{
    (void)state;
#if !defined(APT_TEST_DEVICE)
    for (uint32_t h = 0; h < 65536; h++) {
        const float x = apti_f16_to_f32((uint16_t)h), y = aptc_f16_to_f32((uint16_t)h);
        if ((h & 0x7fff) > 0x7c00) {                                  /* a NaN, whatever it carries */
            const uint16_t back = aptc_f32_to_f16(y);
            if (test_finite(y) || (back & 0x7fff) <= 0x7c00) fail_msg("half %04x is %g and becomes %04x", (unsigned)h, (double)y, back);
            continue;
        }
        if (memcmp(&x, &y, sizeof x) != 0) fail_msg("half %04x is %g, expected %g", (unsigned)h, (double)y, (double)x);
        for (int32_t k = -5; k <= 5; k++) {                           /* between this half and the next one: below, on, above the middle */
            uint32_t bits;
            memcpy(&bits, &x, sizeof bits);
            bits += (uint32_t)(k < 0 ? 0x1000 + k : k > 0 ? 0x1000 * (k & 1) + k : 0);
            float z;
            memcpy(&z, &bits, sizeof z);
            if (aptc_f32_to_f16(z) != apti_f32_to_f16(z))
                fail_msg("%a becomes %04x, expected %04x", (double)z, (unsigned)aptc_f32_to_f16(z), (unsigned)apti_f32_to_f16(z));
        }
    }
    for (float z = 1e-9f; z < 7e-5f; z *= 1.0009f)                    /* and where halves have fewer bits */
        if (aptc_f32_to_f16(-z) != apti_f32_to_f16(-z)) fail_msg("%a becomes %04x", (double)-z, (unsigned)aptc_f32_to_f16(-z));
#else
    test_skip("the conversion belongs to the other unit");
#endif
}

/* Each element of a product whose operands are rounded to `bits` bits behind the point is off by at most 2^-bits of the sum of its
   terms' sizes (two factors with half of that each) and what the sums lose. The operands do not fit the workspace: rows and
   reduction are cut. */
static void narrow_products(apt_cuda_math math, int32_t bits)
{
    enum { M = 700, N = 40, K = 6000 };
    apt_cuda_desc device = APT_ZERO;
    device.math = math;
    device.workspace_bytes = (size_t)8 << 20;
    apt_ctx *ctx = device_context(&device);
    float *a = (float *)apti_data(ctx, M * K, 4), *b = (float *)apti_data(ctx, N * K, 4), *c = (float *)apti_data(ctx, M * N, 4);
    apt_rng rng = apt_rng_make(5, 0);
    for (int64_t i = 0; i < M * K; i++) a[i] = apt_rng_normal(&rng);
    for (int64_t i = 0; i < N * K; i++) b[i] = apt_rng_normal(&rng);
    for (int32_t form = 0; form < 4; form++) {                           /* A and B transposed or not */
        const bool ta = form % 2 == 1, tb = form / 2 == 1;
        apti_gemm g = apti_gemm_begin(c, N, M, N, false);
        g.part[0].k = K;
        g.part[0].a = a;
        g.part[0].a_row = ta ? 1 : K;
        g.part[0].a_col = ta ? M : 1;
        apti_gemm_right(&g.part[0], tb ? APTI_B_PLAIN_T : APTI_B_PLAIN, b, tb ? K : N);
        apti_gemm_run(ctx, &g);
        assert_int_equal(apti_device_check(ctx), APT_OK);
        for (int64_t i = 0; i < M; i += 37)
            for (int64_t j = 0; j < N; j += 7) {
                double sum = 0, size = 0;
                for (int64_t k = 0; k < K; k++) {
                    const double x = (double)a[ta ? k * M + i : i * K + k], y = (double)b[tb ? j * K + k : k * N + j];
                    sum += x * y;
                    size += fabs(x * y);
                }
                const double error = fabs((double)c[i * N + j] - sum);
                if (error > ldexp(size, -bits)) fail_msg("%d bits, form %d (%d, %d): off by %g of %g", (int)bits, form, (int)i, (int)j, error, size);
            }
    }
    apti_free(ctx, a);
    apti_free(ctx, b);
    apti_free(ctx, c);
    apt_destroy(ctx);
}

static void test_narrow_products(void **state)
{
    (void)state;
    narrow_products(APT_CUDA_BF16, 8);
    narrow_products(APT_CUDA_FP16, 11);
}

/* An operand is converted once for products one behind the other, and anew when something has written to it: a product, another
   operation, the CPU. A fresh context knows no better. */
static void test_kept_operands(void **state)
{
    enum { M = 300, N = 70, K = 90, BIG = M * K, SMALL = N * K };
    apt_cuda_desc device = APT_ZERO;
    (void)state;
    device.math = APT_CUDA_BF16;
    device.workspace_bytes = (size_t)8 << 20;
    apt_ctx *ctx = device_context(&device), *fresh = device_context(&device);
    float *a = (float *)apti_data(ctx, BIG, 4), *b = (float *)apti_data(ctx, SMALL, 4), *c = (float *)apti_data(ctx, M * N, 4);
    float *square = (float *)apti_data(ctx, K * K, 4), *want = (float *)apti_data(fresh, M * N, 4), *same = (float *)apti_data(fresh, BIG, 4);
    apt_rng rng = apt_rng_make(6, 0);
    for (int64_t i = 0; i < BIG; i++) a[i] = apt_rng_normal(&rng);
    for (int64_t i = 0; i < SMALL; i++) b[i] = apt_rng_normal(&rng);
    for (int64_t i = 0; i < K * K; i++) square[i] = apt_rng_normal(&rng);
    for (int32_t round = 0; round < 8; round++) {
        int64_t before[2], after[2];
        apti_gemm g = apti_gemm_begin(c, N, M, N, false);
        apti_gemm_left(&g.part[0], a, K, K);
        apti_gemm_right(&g.part[0], APTI_B_PLAIN, b, N);
        if (round == 3) apti_zero(ctx, a + 5 * K, 40 * K);                     /* another operation writes */
        if (round == 5) {                                                      /* a product does */
            apti_gemm to = apti_gemm_begin(a, K, K, K, true);
            apti_gemm_left(&to.part[0], square, K, K);
            apti_gemm_right(&to.part[0], APTI_B_PLAIN, square, K);
            apti_gemm_run(ctx, &to);
        }
        if (round == 7) {                                                      /* the CPU does */
            apti_sync(ctx);
            a[BIG - 1] += 100;
        }
        count_launches(ctx, before);
        apti_gemm_run(ctx, &g);
        count_launches(ctx, after);
        expect_launches("a product", after[0] - before[0], round == 1 ? 2 : 3);     /* b is small, and converted anew */
        if (round % 2 == 0) continue;                                          /* looking is a wait, which forgets as well */
        assert_int_equal(apti_device_check(ctx), APT_OK);
        memcpy(same, a, BIG * sizeof(float));
        g.c = want;
        g.part[0].a = same;
        apti_gemm_run(fresh, &g);
        assert_int_equal(apti_device_check(fresh), APT_OK);
        assert_memory_equal(c, want, M * N * sizeof(float));
    }
    float *const blocks[] = {a, b, c, square};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) apti_free(ctx, blocks[i]);
    apti_free(fresh, want);
    apti_free(fresh, same);
    apt_destroy(ctx);
    apt_destroy(fresh);
}

/* ---- matrices held in bfloat16 ---- */

/* Matrices that have had to become floats. Only the emulated device counts. */
static int64_t count_widened(const apt_ctx *ctx)
{
#if defined(APT_TEST_DEVICE)
    (void)ctx;
    return -1;
#else
    return ((const aptc_device *)ctx->desc.backend->self)->widened;
#endif
}

static void expect_widened(const apt_ctx *ctx, int64_t count)
{
    const int64_t widened = count_widened(ctx);
    if (widened >= 0 && widened != count) fail_msg("%d matrices became floats, expected %d", (int)widened, (int)count);
}

enum { OW_ROWS = 40, OW_N = 20, OW_LD = 24, OW_CELLS = OW_ROWS * OW_LD };

typedef struct owned_case { apt_ctx *ctx; float *x, *given, *out; double want[OW_CELLS]; } owned_case;

static double as_bf16(float x) { return (double)apti_half_to_f32(apti_f32_to_half(x, APT_BF16), APT_BF16); }

/* x(rows, n) from `at` on = the given numbers */
static void owned_write(owned_case *c, int64_t at, int64_t ld, int64_t rows, int64_t n)
{
    apti_copy_rows(c->ctx, c->x + at, ld, c->given, n, rows, n);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j++) c->want[at + i * ld + j] = as_bf16(c->given[i * n + j]);
}

static void owned_read(owned_case *c, int64_t at, int64_t ld, int64_t rows, int64_t n)
{
    apti_copy_rows(c->ctx, c->out, n, c->x + at, ld, rows, n);
    apti_sync_results(c->ctx);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j++)
            if ((double)c->out[i * n + j] != c->want[at + i * ld + j])
                fail_msg("(%d, %d) from %d on is %g, expected %g", (int)i, (int)j, (int)at, (double)c->out[i * n + j],
                         c->want[at + i * ld + j]);
}

/* What is written into memory that the CPU does not look at is read as it was written, whole and in parts, and by the CPU when it
   looks; it becomes floats where another form of it is asked for, and only there. */
static void test_owned(void **state)
{
    owned_case c;
    apt_cuda_desc device = APT_ZERO;
    (void)state;
    memset(&c, 0, sizeof c);
    device.math = APT_CUDA_BF16;
    device.workspace_bytes = (size_t)8 << 20;
    c.ctx = device_context(&device);
    apt_backend *backend = c.ctx->desc.backend;
    c.x = (float *)apti_data_zero(c.ctx, OW_CELLS, 4);
    c.given = (float *)apti_data(c.ctx, OW_CELLS, 4);
    c.out = (float *)apti_data(c.ctx, OW_CELLS, 4);
    apt_rng rng = apt_rng_make(21, 0);
    for (int64_t i = 0; i < OW_CELLS; i++) c.given[i] = apt_rng_normal(&rng);
    backend->own(backend->self, c.x, OW_CELLS * sizeof(float));
    owned_write(&c, 0, OW_LD, OW_ROWS, OW_N);
    owned_read(&c, 0, OW_LD, OW_ROWS, OW_N);
    owned_read(&c, 5 * OW_LD + 3, OW_LD, 10, 7);                     /* a part */
    owned_write(&c, 10 * OW_LD, OW_LD, 9, OW_N);                     /* into a part: the rest stays */
    owned_read(&c, 0, OW_LD, OW_ROWS, OW_N);
    apti_copy_rows(c.ctx, c.x + OW_LD, OW_LD, NULL, 0, 2, OW_N);     /* zeros into a part */
    for (int64_t j = 0; j < OW_N; j++) c.want[OW_LD + j] = c.want[2 * OW_LD + j] = 0;
    owned_read(&c, 0, OW_LD, OW_ROWS, OW_N);
    apti_scale_run(c.ctx, c.x + 4 * OW_LD, 3 * OW_LD, 0.5f);         /* rows with their padding */
    for (int64_t i = 4 * OW_LD; i < 7 * OW_LD; i++) c.want[i] *= 0.5;
    owned_read(&c, 0, OW_LD, OW_ROWS, OW_N);
    expect_widened(c.ctx, 0);
    owned_read(&c, OW_LD, 2 * OW_LD, 4, OW_N);                       /* every second row: another form */
    expect_widened(c.ctx, 1);
    owned_read(&c, 0, OW_LD, OW_ROWS, OW_N);                         /* floats now */
    owned_write(&c, 0, OW_LD + 8, 30, OW_N);                         /* another matrix in the same place */
    owned_read(&c, 0, OW_LD + 8, 30, OW_N);
    expect_widened(c.ctx, 1);
    owned_write(&c, 10 * (OW_LD + 8), OW_N, 20, OW_N);               /* one that covers some of its rows: the others stay */
    owned_read(&c, 0, OW_LD + 8, 10, OW_N);
    owned_read(&c, 10 * (OW_LD + 8), OW_N, 20, OW_N);
    expect_widened(c.ctx, 2);
    apti_sync(c.ctx);                                                /* the CPU looks */
    for (int64_t i = 0; i < 20 * OW_N; i++)
        if ((double)c.x[10 * (OW_LD + 8) + i] != c.want[10 * (OW_LD + 8) + i]) fail_msg("the CPU sees another %d", (int)i);
    expect_widened(c.ctx, 3);
    owned_write(&c, 0, OW_LD, OW_ROWS, OW_N);
    backend->forget(backend->self, c.x, OW_CELLS * sizeof(float));
    apti_sync(c.ctx);
    expect_widened(c.ctx, 3);
    apti_free(c.ctx, c.x);
    apti_free(c.ctx, c.given);
    apti_free(c.ctx, c.out);
    apt_destroy(c.ctx);
}

/* Products whose results are held in bfloat16, with all that may follow: each rounding of a stored value adds 2^-8 of its size (to
   nearest: half of that) to what operands lose. */
static void test_owned_products(void **state)
{
    enum { M = 70, N = 45, K = 130, LD = 48 };
    apt_cuda_desc device = APT_ZERO;
    (void)state;
    device.math = APT_CUDA_BF16;
    device.workspace_bytes = (size_t)8 << 20;
    apt_ctx *ctx = device_context(&device);
    apt_backend *backend = ctx->desc.backend;
    float *a = (float *)apti_data(ctx, M * K, 4), *b = (float *)apti_data(ctx, N * K, 4), *rest = (float *)apti_data(ctx, M * LD, 4);
    float *bias = (float *)apti_data(ctx, N, 4), *mask = (float *)apti_data(ctx, N, 4), *c = (float *)apti_data(ctx, 2 * M * LD, 4);
    float *out = (float *)apti_data(ctx, M * LD, 4), *pre = c + M * LD;
    apt_rng rng = apt_rng_make(22, 0);
    for (int64_t i = 0; i < M * K; i++) a[i] = apt_rng_normal(&rng);
    for (int64_t i = 0; i < N * K; i++) b[i] = 0.1f * apt_rng_normal(&rng);
    for (int64_t i = 0; i < M * LD; i++) rest[i] = apt_rng_normal(&rng);
    for (int64_t j = 0; j < N; j++) bias[j] = apt_rng_normal(&rng), mask[j] = (float)apt_rng_uniform(&rng);
    backend->own(backend->self, c, 2 * M * LD * sizeof(float));
    for (int32_t form = 0; form < 32; form++) {
        apti_gemm g = apti_gemm_begin(c, LD, M, N, false);
        apti_gemm_left(&g.part[0], a, K, K);
        apti_gemm_right(&g.part[0], APTI_B_PLAIN_T, b, K);
        g.bias = form & 1 ? bias : NULL;
        g.act = form & 2 ? APT_GELU_ERF : -1;
        g.pre = form & 4 ? pre : NULL;
        g.ld_pre = LD;
        g.residual = form & 8 ? rest : NULL;
        g.ld_residual = LD;
        g.mask = form & 16 ? mask : NULL;
        apti_gemm_run(ctx, &g);
        apti_copy_rows(ctx, out, LD, c, LD, M, N);
        apti_sync(ctx);
        assert_int_equal(ctx->device_result, APT_OK);
        for (int64_t i = 0; i < M; i++)
            for (int64_t j = 0; j < N; j++) {
                double z = g.bias != NULL ? (double)bias[j] : 0, size = fabs(z);
                for (int64_t k = 0; k < K; k++) {
                    z += (double)a[i * K + k] * (double)b[j * K + k];
                    size += fabs((double)a[i * K + k] * (double)b[j * K + k]);
                }
                const double error = ldexp(size, -8) + ldexp(fabs(z), -8), m = g.mask != NULL ? (double)mask[j] : 1;
                double y = g.act >= 0 ? 0.5 * z * erfc(-z / sqrt(2)) : z;
                if (g.residual != NULL) y += (double)rest[i * LD + j];
                const double bound = 1.13 * error * m + ldexp(fabs(y * m), -8) + 1e-6;          /* |gelu'| < 1.13 */
                if (fabs((double)out[i * LD + j] - y * m) > bound)
                    fail_msg("form %d (%d, %d): %g, expected %g within %g", (int)form, (int)i, (int)j, (double)out[i * LD + j], y * m, bound);
                if (g.pre != NULL && fabs((double)pre[i * LD + j] - z) > error + 1e-6) fail_msg("form %d: pre of (%d, %d)", (int)form, (int)i, (int)j);
            }
    }
    float *const blocks[] = {a, b, rest, bias, mask, c, out};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) apti_free(ctx, blocks[i]);
    apt_destroy(ctx);
}

/* ---- sums inside other launches ---- */

enum { SI_ROWS = 333, SI_N = 300, SI_LD = 304, SI_K = 8, SI_HEADS = 5, SI_ARRAYS = 8 };

typedef struct sums_inside {
    apt_ctx *ctx;
    float *x[SI_ARRAYS], *stats, *vector;        /* x[0]: what is added up */
    int32_t *offsets;
    apti_attention_op at;
    int64_t rows;
} sums_inside;

static void sums_begin(sums_inside *s, int64_t rows, const int32_t *offsets, int32_t sequences)
{
    apt_cuda_desc device = APT_ZERO;
    apt_rng rng = apt_rng_make(16, 0);
    memset(s, 0, sizeof *s);
    device.workspace_bytes = (size_t)8 << 20;
    s->ctx = device_context(&device);
    s->rows = rows;
    for (int32_t k = 0; k < SI_ARRAYS; k++) {
        s->x[k] = (float *)apti_data(s->ctx, rows * SI_LD, 4);
        for (int64_t i = 0; i < rows * SI_LD; i++) s->x[k][i] = apt_rng_normal(&rng);
    }
    s->stats = (float *)apti_data(s->ctx, rows * SI_HEADS, 4);       /* of norms, or of attention */
    s->vector = (float *)apti_data(s->ctx, SI_N, 4);
    s->offsets = (int32_t *)apti_data(s->ctx, sequences + 1, 4);
    for (int64_t i = 0; i < rows * SI_HEADS; i++) s->stats[i] = 1;
    for (int32_t j = 0; j < SI_N; j++) s->vector[j] = (float)(j % 3) / 2;
    for (int32_t i = 0; i <= sequences; i++) s->offsets[i] = offsets != NULL ? offsets[i] : i;
    s->at.heads = s->at.kv_heads = SI_HEADS;
    s->at.head_dim = SI_N / SI_HEADS;
    s->at.scale = 0.1f;
    s->at.sequences = sequences;
    s->at.q_offsets = s->at.k_offsets = s->offsets;
}

static void sums_end(sums_inside *s)
{
    for (int32_t k = 0; k < SI_ARRAYS; k++) apti_free(s->ctx, s->x[k]);
    apti_free(s->ctx, s->stats);
    apti_free(s->ctx, s->vector);
    apti_free(s->ctx, s->offsets);
    apt_destroy(s->ctx);
}

typedef void (*sums_op)(const sums_inside *s);

static void write_product(const sums_inside *s)
{
    apti_gemm g = apti_gemm_begin(s->x[0], SI_LD, s->rows, SI_N, false);
    apti_gemm_left(&g.part[0], s->x[1], SI_LD, SI_K);
    apti_gemm_right(&g.part[0], APTI_B_PLAIN, s->x[2], SI_LD);
    g.act = APT_GELU_ERF;
    apti_gemm_run(s->ctx, &g);
}

static void write_far(const sums_inside *s)
{
    write_product(s);
    apti_zero(s->ctx, s->x[5], 1);
}

static void write_gate(const sums_inside *s)
{
    apti_gate_forward(s->ctx, s->x[0], SI_LD, s->x[1], SI_LD, s->x[2], SI_LD, NULL, s->rows, SI_N);
}

static void write_masked(const sums_inside *s)   /* as apti_mask_hidden does */
{
    apti_act_backward(s->ctx, s->x[0], SI_LD, s->x[0], SI_LD, NULL, 0, s->vector, s->rows, SI_N, -1);
}

static void write_residual(const sums_inside *s)
{
    apti_residual(s->ctx, s->x[0], SI_LD, s->x[1], SI_LD, s->x[2], SI_LD, s->vector, s->rows, SI_N);
}

static void write_norm(const sums_inside *s)
{
    apti_layernorm_forward(s->ctx, s->x[0], SI_LD, s->stats, s->x[1], SI_LD, s->x[2], s->x[3], s->vector, s->rows, SI_N, 1e-5f);
}

static void write_attention(const sums_inside *s)
{
    apti_attention_forward(s->ctx, &s->at, s->x[0], SI_LD, s->stats, s->x[1], SI_LD, s->x[2], SI_LD, s->x[3], SI_LD);
}

static void read_act(const sums_inside *s)
{
    apti_act_backward(s->ctx, s->x[3], SI_LD, s->x[0], SI_LD, s->x[4], SI_LD, NULL, s->rows, SI_N, APT_RELU);
}

static void read_gate(const sums_inside *s)
{
    apti_gate_backward(s->ctx, s->x[3], SI_LD, s->x[4], SI_LD, s->x[0], SI_LD, s->x[1], SI_LD, s->x[2], SI_LD, NULL, s->rows, SI_N, APT_SILU);
}

static void read_residual(const sums_inside *s)
{
    apti_residual(s->ctx, s->x[1], SI_LD, s->x[0], SI_LD, s->x[2], SI_LD, s->vector, s->rows, SI_N);
}

static void read_norm(const sums_inside *s)
{
    apti_layernorm_backward(s->ctx, s->x[3], SI_LD, NULL, NULL, s->x[0], SI_LD, s->x[1], SI_LD, s->stats, s->x[2], s->vector, s->rows, SI_N);
}

static void read_attention(const sums_inside *s)
{
    apti_attention_backward(s->ctx, &s->at, s->x[4], SI_LD, s->x[5], SI_LD, s->x[6], SI_LD, NULL, s->x[0], SI_LD, NULL, 0, s->stats, s->x[1],
                            SI_LD, s->x[2], SI_LD, s->x[3], SI_LD);
}

/* What the two launch together; what each makes is checked elsewhere, so only the sums are here. */
static int64_t sums_check(sums_inside *s, const char *name, sums_op write, sums_op read, bool plain)
{
    int64_t before[2], after[2];
    float *sums = (float *)apti_data(s->ctx, 2 * SI_N, 4), *of = (float *)malloc((size_t)(s->rows * SI_LD) * sizeof(float));
    apti_zero(s->ctx, sums, 2 * SI_N);
    apti_sync(s->ctx);
    count_launches(s->ctx, before);
    if (read != NULL) memcpy(of, s->x[0], (size_t)(s->rows * SI_LD) * sizeof(float));
    if (write != NULL) write(s);
    apti_column_abs_sum(s->ctx, sums, s->x[0], SI_LD, s->rows, SI_N);
    if (plain) apti_column_sum(s->ctx, sums + SI_N, s->x[0], SI_LD, s->rows, SI_N);
    if (read != NULL) read(s);
    assert_int_equal(apti_device_check(s->ctx), APT_OK);
    assert_int_equal(s->ctx->fallbacks, 0);
    count_launches(s->ctx, after);
    if (write != NULL) memcpy(of, s->x[0], (size_t)(s->rows * SI_LD) * sizeof(float));
    for (int64_t j = 0; j < SI_N; j++) {
        double size = 0, sum = 0;
        for (int64_t i = 0; i < s->rows; i++) {
            size += fabs((double)of[i * SI_LD + j]);
            sum += (double)of[i * SI_LD + j];
        }
        if (fabs((double)sums[j] - size) > 1e-5 * size || (plain && fabs((double)sums[SI_N + j] - sum) > 1e-5 * size))
            fail_msg("%s, column %d: %g and %g instead of %g and %g", name, (int)j, (double)sums[j], (double)sums[SI_N + j], size, sum);
    }
    apti_free(s->ctx, sums);
    free(of);
    return after[0] - before[0];
}

/* Sums of |x| are part of the launch that writes x or reads it, if that stands beside them, and the same up to rounding. */
static void test_sums_inside(void **state)
{
    static const int32_t offsets[] = {0, 100, 100, 101, 181, SI_ROWS};       /* tiles that are full and not, one sequence without rows */
    static const struct { const char *name; sums_op write, read; bool plain; int32_t launches; } form[] = {
        {"product with an activation", write_product, NULL, false, 3},       /* the product, its end, and the sum of the blocks' sums */
        {"a gate", write_gate, NULL, false, 2},
        {"an activation's gradient", NULL, read_act, false, 2},
        {"a gate's gradient", NULL, read_gate, false, 2},
        {"something stands between", write_far, NULL, false, 5},
        {"a mask", write_masked, NULL, false, 2},
        {"a residual", write_residual, NULL, false, 2},
        {"into a residual", NULL, read_residual, false, 2},
        {"a norm", write_norm, NULL, false, 2},
        {"a norm's gradient", NULL, read_norm, false, 2},
        {"attention", write_attention, NULL, true, 3},
        {"attention's gradient", NULL, read_attention, false, 4},            /* dot, dq, dk and dv */
        {"a norm and attention's gradient", write_norm, read_attention, false, 5},
        {"attention and a residual", write_attention, read_residual, true, 4},
    };
    (void)state;
    sums_inside s;
    sums_begin(&s, SI_ROWS, offsets, 5);
    for (size_t i = 0; i < sizeof form / sizeof *form; i++) {
        const int64_t launches = sums_check(&s, form[i].name, form[i].write, form[i].read, form[i].plain);
        expect_launches(form[i].name, launches, form[i].launches);
    }
    sums_end(&s);
}

/* What a norm makes of the last rows is what it makes of them alone. */
static void norm_rows_alone(const sums_inside *s, sums_op op, int32_t out)
{
    enum { LAST = 100 };
    const int64_t at = (s->rows - LAST) * SI_LD;
    sums_inside last = *s;
    float *const want = (float *)malloc(LAST * SI_LD * sizeof(float));
    op(s);
    apti_sync(s->ctx);
    memcpy(want, s->x[out] + at, LAST * SI_LD * sizeof(float));
    memset(s->x[out] + at, 0x55, LAST * SI_LD * sizeof(float));
    for (int32_t k = 0; k < 2; k++) last.x[k] += at;
    if (out > 1) last.x[out] += at;
    last.stats += 2 * (s->rows - LAST);
    last.rows = LAST;
    op(&last);
    assert_int_equal(apti_device_check(s->ctx), APT_OK);
    for (int64_t i = 0; i < LAST; i++) assert_memory_equal(want + i * SI_LD, s->x[out] + at + i * SI_LD, SI_N * sizeof(float));
    free(want);
}

/* More rows than a norm's blocks have warps; and so many sequences that the sums of their blocks have no room: sums are taken alone
   then, as if they were not beside anything. */
static void test_sums_many_rows(void **state)
{
    enum { SEQUENCES = 8300 };                   /* of one token: 8300 * 300 floats are more than 8 MiB */
    (void)state;
    sums_inside s;
    sums_begin(&s, SEQUENCES, NULL, SEQUENCES);
    expect_launches("attention", sums_check(&s, "attention", write_attention, NULL, true), 5);
    expect_launches("attention's gradient", sums_check(&s, "attention's gradient", NULL, read_attention, false), 5);
    expect_launches("a norm", sums_check(&s, "a norm", write_norm, NULL, false), 2);
    expect_launches("a norm's gradient", sums_check(&s, "a norm's gradient", NULL, read_norm, false), 2);
    norm_rows_alone(&s, write_norm, 0);
    norm_rows_alone(&s, read_norm, 3);
    sums_end(&s);
}

/* With room for the sums of one of a norm's two vectors at a time, both are summed up, each once. */
static void test_norm_room(void **state)
{
    (void)state;
#ifdef APT_TEST_DEVICE
    test_skip("the room of a real device's context is its own");
#else
    sums_inside s;
    sums_begin(&s, SI_ROWS, NULL, 1);
    aptc_device *d = (aptc_device *)s.ctx->desc.backend->self;
    const size_t room = d->work_bytes;
    float *dgamma = (float *)apti_data(s.ctx, SI_N, 4), *dbeta = (float *)apti_data(s.ctx, SI_N, 4);
    d->work_bytes = (size_t)aptc_sizes_bytes(SI_ROWS, SI_N) + 256;
    apti_zero(s.ctx, dgamma, SI_N);
    apti_zero(s.ctx, dbeta, SI_N);
    apti_layernorm_backward(s.ctx, s.x[3], SI_LD, dgamma, dbeta, s.x[0], SI_LD, s.x[1], SI_LD, s.stats, s.x[2], NULL, SI_ROWS, SI_N);
    assert_int_equal(apti_device_check(s.ctx), APT_OK);
    assert_int_equal(s.ctx->fallbacks, 0);
    for (int64_t j = 0; j < SI_N; j++) {
        double gamma = 0, beta = 0, gamma_size = 0, beta_size = 0;
        for (int64_t i = 0; i < SI_ROWS; i++) {
            const double dy = (double)s.x[0][i * SI_LD + j], x = (double)s.x[1][i * SI_LD + j] - 1;       /* mean and rstd are 1 */
            gamma += dy * x;
            beta += dy;
            gamma_size += fabs(dy * x);
            beta_size += fabs(dy);
        }
        assert_true(fabs((double)dgamma[j] - gamma) <= 1e-5 * gamma_size && fabs((double)dbeta[j] - beta) <= 1e-5 * beta_size);
    }
    d->work_bytes = room;
    apti_free(s.ctx, dgamma);
    apti_free(s.ctx, dbeta);
    sums_end(&s);
#endif
}

/* Attention whose products round their operands to `bits` bits, in double and with a bound for every element: rounding moves the
   logits of query i by at most slack, so each probability by a factor within exp(+-2 slack); what a product adds is 2^-bits of the
   sum of its terms' sizes, and what it takes from a product before it is that one's bound. Results that are rounded are off by half
   of that again (written). */
enum { NA_SEQUENCES = 12, NA_MARGIN = 3 /* rows and columns around a matrix that nobody may touch */ };

typedef struct narrow_shape {
    int32_t heads, kv, dim, span;     /* span 0: no bias */
    bool causal, masked, ends, halves, aligned;
    int32_t sequences, queries[NA_SEQUENCES], keys[NA_SEQUENCES];
} narrow_shape;

typedef struct narrow_case {
    const narrow_shape *shape;
    apt_ctx *ctx;
    apti_attention_op op;
    int64_t rows_q, rows_k, ld_q, ld_k, longest_q, longest_k;
    float *q, *k, *v, *d_o, *o, *lse, *dq, *dk, *dv, *bias, *mask;
    int32_t *offsets;                 /* of queries, of keys, and ends */
    double *dk_true, *dk_bound, *dv_true, *dv_bound;
    double unit, scale, written;      /* 2^-bits */
} narrow_case;

static void expect_within(const char *what, int64_t row, int64_t column, double value, double truth, double bound)
{
    if (!(fabs(value - truth) <= bound))
        fail_msg("%s(%d, %d) is %.9g, not %.9g: off by %g, at most %g", what, (int)row, (int)column, value, truth, fabs(value - truth), bound);
}

/* Query i of sequence s, head h */
static void narrow_row(narrow_case *c, int32_t s, int64_t i, int64_t h)
{
    const narrow_shape *shape = c->shape;
    const int64_t dim = shape->dim, row = c->op.q_offsets[s] + i, group = h / (shape->heads / shape->kv), last = shape->span - 1;
    const int64_t at = c->op.k_offsets[s] * c->ld_k + group * dim, there = shape->keys[s];
    const int64_t shift = shape->causal ? there - shape->queries[s] : 0;
    const int64_t keys = shape->causal ? (i + shift + 1 < 0 ? 0 : i + shift + 1 < there ? i + shift + 1 : there) : there;
    const float *q = c->q + row * c->ld_q + h * dim, *d_o = c->d_o + row * c->ld_q + h * dim, *k = c->k + at, *v = c->v + at;
    const double mask = c->mask != NULL ? (double)c->mask[group] : 1.0;
    double *room = (double *)test_memory_block((size_t)(3 * there + 1) * sizeof(double)), *p = room, *dp = p + there, *dp_size = dp + there;
    double slack = 0, top = -INFINITY, sum = 0, mean = 0, mean_bound = 0;
    for (int64_t j = 0; j < keys; j++) {
        double logit = 0, size = 0;
        dp[j] = dp_size[j] = 0;
        for (int64_t x = 0; x < dim; x++) {
            const double term = (double)q[x] * (double)k[j * c->ld_k + x], slope = mask * (double)d_o[x] * (double)v[j * c->ld_k + x];
            logit += term;
            size += fabs(term);
            dp[j] += slope;
            dp_size[j] += fabs(slope);
        }
        p[j] = c->scale * logit;
        if (c->bias != NULL) {
            const int64_t distance = j - i - shift;
            p[j] += (double)c->bias[h * (2 * last + 1) + last + (distance < -last ? -last : distance > last ? last : distance)];
        }
        slack = fmax(slack, c->scale * size * c->unit);
        top = fmax(top, p[j]);
    }
    for (int64_t j = 0; j < keys; j++) sum += p[j] = exp(p[j] - top);
    const double loose = exp(2 * slack) - 1;
    expect_within("lse", row, h, (double)c->lse[row * shape->heads + h], keys > 0 ? top + log(sum) : 0, slack + 1e-5);
    for (int64_t j = 0; j < keys; j++) p[j] /= sum;
    for (int64_t x = 0; x < dim; x++) {
        double o = 0, size = 0;
        for (int64_t j = 0; j < keys; j++) {
            o += mask * p[j] * (double)v[j * c->ld_k + x];
            size += fabs(mask) * p[j] * fabs((double)v[j * c->ld_k + x]);
        }
        const double bound = keys > 0 ? (size * (loose + c->unit) + 1e-5) * (1 + c->written) + fabs(o) * c->written : 0;
        expect_within("o", row, h * dim + x, (double)c->o[row * c->ld_q + h * dim + x], o, bound);
        mean += (double)d_o[x] * o;
        mean_bound += fabs((double)d_o[x]) * bound;
    }
    for (int64_t x = 0; x < dim; x++) {
        double dq = 0, bound = 1e-5;
        for (int64_t j = 0; j < keys; j++) {
            const double ds = p[j] * (dp[j] - mean), key = fabs((double)k[j * c->ld_k + x]);
            const double off = p[j] * (loose * fabs(dp[j] - mean) + (1 + loose) * (dp_size[j] * c->unit + mean_bound));
            const int64_t place = at + j * c->ld_k + x;
            dq += c->scale * ds * (double)k[j * c->ld_k + x];
            bound += c->scale * (off + fabs(ds) * c->unit) * (1 + c->unit) * key;
            c->dk_true[place] += c->scale * ds * (double)q[x];
            c->dv_true[place] += mask * p[j] * (double)d_o[x];
            c->dk_bound[place] += c->scale * (off + fabs(ds) * c->unit) * (1 + c->unit) * fabs((double)q[x]);
            c->dv_bound[place] += p[j] * (loose + c->unit) * (1 + c->unit) * fabs(mask * (double)d_o[x]);
        }
        expect_within("dq", row, h * dim + x, (double)c->dq[row * c->ld_q + h * dim + x], dq, bound * (1 + c->written) + fabs(dq) * c->written);
    }
    free(room);
}

/* A number that a half keeps, where views are of halves. */
static float narrow_value(const narrow_case *c, apt_rng *rng)
{
    const float x = apt_rng_normal(rng);
    if (!c->shape->halves) return x;
    return c->unit < 1.0 / 1000 ? apti_f16_to_f32(apti_f32_to_f16(x)) : apti_bf16_to_f32(apti_f32_to_bf16(x));
}

static void narrow_begin(narrow_case *c, const narrow_shape *shape, apt_cuda_math math, int32_t bits)
{
    apt_cuda_desc device = APT_ZERO;
    device.math = math;
    device.workspace_bytes = (size_t)8 << 20;
    memset(c, 0, sizeof *c);
    c->shape = shape;
    c->ctx = device_context(&device);
    c->unit = ldexp(1, -bits);
    c->offsets = (int32_t *)apti_data(c->ctx, 3 * (NA_SEQUENCES + 1), 4);
    int32_t *q_offsets = c->offsets, *k_offsets = q_offsets + NA_SEQUENCES + 1, *ends = k_offsets + NA_SEQUENCES + 1;
    q_offsets[0] = k_offsets[0] = 0;
    for (int32_t s = 0; s < shape->sequences; s++) {
        q_offsets[s + 1] = q_offsets[s] + shape->queries[s];
        ends[s] = k_offsets[s] + shape->keys[s];
        k_offsets[s + 1] = ends[s] + (shape->ends ? 5 : 0);
        if (shape->queries[s] > c->longest_q) c->longest_q = shape->queries[s];
        if (shape->keys[s] > c->longest_k) c->longest_k = shape->keys[s];
    }
    c->rows_q = q_offsets[shape->sequences];
    c->rows_k = k_offsets[shape->sequences];
    c->ld_q = shape->heads * shape->dim;
    c->ld_k = shape->kv * shape->dim;
    if (shape->aligned) {
        c->ld_q = (c->ld_q + 7) / 8 * 8;
        c->ld_k = (c->ld_k + 7) / 8 * 8;
    } else {
        c->ld_q += NA_MARGIN;
        c->ld_k += NA_MARGIN;
    }
    apt_rng rng = apt_rng_make(15, 0);
    float **const wide[] = {&c->q, &c->d_o, &c->o, &c->dq}, **const narrow[] = {&c->k, &c->v, &c->dk, &c->dv};
    for (int32_t k = 0; k < 4; k++) {
        *wide[k] = (float *)apti_data(c->ctx, c->rows_q * c->ld_q, 4);
        *narrow[k] = (float *)apti_data(c->ctx, c->rows_k * c->ld_k, 4);
        for (int64_t i = 0; i < c->rows_q * c->ld_q; i++) (*wide[k])[i] = narrow_value(c, &rng);
        for (int64_t i = 0; i < c->rows_k * c->ld_k; i++) (*narrow[k])[i] = narrow_value(c, &rng);
    }
    c->lse = (float *)apti_data(c->ctx, c->rows_q * shape->heads, 4);
    if (shape->span > 0) {
        c->bias = (float *)apti_data(c->ctx, shape->heads * (2 * shape->span - 1), 4);
        for (int32_t i = 0; i < shape->heads * (2 * shape->span - 1); i++) c->bias[i] = apt_rng_normal(&rng);
    }
    if (shape->masked) {
        c->mask = (float *)apti_data(c->ctx, shape->kv, 4);
        for (int32_t i = 0; i < shape->kv; i++) c->mask[i] = i % 3 == 0 ? 0.375f : i % 3 == 1 ? 1.0f : 0.0f;
    }
    c->op.heads = shape->heads;
    c->op.kv_heads = shape->kv;
    c->op.head_dim = shape->dim;
    c->op.scale = 1 / sqrtf((float)shape->dim);
    c->op.causal = shape->causal;
    c->op.sequences = shape->sequences;
    c->op.q_offsets = q_offsets;
    c->op.k_offsets = k_offsets;
    c->op.k_ends = shape->ends ? ends : NULL;
    c->op.bias = c->bias;
    c->op.bias_span = shape->span;
    c->op.head_mask = c->mask;
    c->scale = (double)c->op.scale;
    double **const truth[] = {&c->dk_true, &c->dk_bound, &c->dv_true, &c->dv_bound};
    for (int32_t k = 0; k < 4; k++) {
        *truth[k] = (double *)test_memory_block((size_t)(c->rows_k * c->ld_k) * sizeof(double));
        memset(*truth[k], 0, (size_t)(c->rows_k * c->ld_k) * sizeof(double));
    }
}

static void narrow_end(narrow_case *c)
{
    float *const all[] = {c->q, c->d_o, c->o, c->dq, c->k, c->v, c->dk, c->dv, c->lse, c->bias, c->mask};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) apti_free(c->ctx, all[k]);
    apti_free(c->ctx, c->offsets);
    free(c->dk_true);
    free(c->dk_bound);
    free(c->dv_true);
    free(c->dv_bound);
    apt_destroy(c->ctx);
}

static void narrow_check(narrow_case *c)
{
    const narrow_shape *shape = c->shape;
    for (int32_t s = 0; s < shape->sequences; s++)
        for (int64_t i = 0; i < shape->queries[s]; i++)
            for (int64_t h = 0; h < shape->heads; h++) narrow_row(c, s, i, h);
    for (int32_t s = 0; s < shape->sequences; s++)
        for (int64_t j = 0; j < shape->keys[s]; j++)
            for (int64_t x = 0; x < shape->kv * shape->dim; x++) {
                const int64_t row = c->op.k_offsets[s] + j, at = row * c->ld_k + x;
                expect_within("dk", row, x, (double)c->dk[at], c->dk_true[at],
                              (c->dk_bound[at] + 1e-5) * (1 + c->written) + fabs(c->dk_true[at]) * c->written);
                expect_within("dv", row, x, (double)c->dv[at], c->dv_true[at],
                              (c->dv_bound[at] + 1e-5) * (1 + c->written) + fabs(c->dv_true[at]) * c->written);
            }
}

static void narrow_attention(const narrow_shape *shape, apt_cuda_math math, int32_t bits)
{
    narrow_case c;
    narrow_begin(&c, shape, math, bits);
    apti_attention_forward(c.ctx, &c.op, c.o, c.ld_q, c.lse, c.q, c.ld_q, c.k, c.ld_k, c.v, c.ld_k);
    apti_attention_backward(c.ctx, &c.op, c.dq, c.ld_q, c.dk, c.ld_k, c.dv, c.ld_k, NULL, c.d_o, c.ld_q, c.o, c.ld_q, c.lse, c.q, c.ld_q, c.k,
                            c.ld_k, c.v, c.ld_k);
    assert_int_equal(apti_device_check(c.ctx), APT_OK);
    assert_int_equal(c.ctx->fallbacks, 0);
    narrow_check(&c);
    narrow_end(&c);
}

static void test_narrow_attention(void **state)
{
    (void)state;
    narrow_shape shape = {4, 2, 24, 0, false, false, false, false, true, 2, {70, 33}, {70, 33}};
    for (int32_t causal = 0; causal < 2; causal++) {
        shape.causal = causal != 0;
        narrow_attention(&shape, APT_CUDA_BF16, 8);
        narrow_attention(&shape, APT_CUDA_FP16, 11);
        narrow_attention(&shape, APT_CUDA_FP32, 20);
    }
}

#if !defined(APT_TEST_DEVICE)
/* What a view of halves or floats is of: halves are a copy, to be copied back. */
static aptc_view narrow_view(const narrow_case *c, float *x, int64_t rows, int64_t ld, apt_dtype type)
{
    aptc_view v = {x, ld, APT_F32};
    if (!c->shape->halves) return v;
    v.data = apti_data(c->ctx, rows * ld, 2);
    v.type = type;
    for (int64_t i = 0; i < rows * ld; i++) aptc_store(v.data, type, i, x[i]);
    return v;
}

static void narrow_back(const narrow_case *c, const aptc_view *v, float *x, int64_t rows, int64_t ld)
{
    if (!c->shape->halves) return;
    for (int64_t i = 0; i < rows * ld; i++) x[i] = aptc_load(v->data, (apt_dtype)v->type, i);
    apti_free(c->ctx, v->data);
}

/* sums(sequences * blocks * lanes, heads * dim) of x over the rows of each block; where x has been rounded, they are of what it was
   before. */
static void narrow_sums(const narrow_case *c, const aptc_attention *a, const float *x, const float *sums, bool sizes, double written)
{
    const int64_t lanes = aptc_sum_lanes(a), width = (int64_t)a->heads * a->dim;
    for (int32_t s = 0; s < c->shape->sequences; s++)
        for (int64_t b = 0; b < a->blocks; b++)
            for (int64_t j = 0; j < width; j++) {
                double sum = 0, size = 0, found = 0;
                for (int64_t lane = 0; lane < lanes; lane++)
                    found += (double)sums[((s * a->blocks + b) * lanes + lane) * width + j];
                for (int64_t i = b * APTC_FLASH_ROWS; i < (b + 1) * APTC_FLASH_ROWS && i < c->shape->queries[s]; i++) {
                    const double value = (double)x[(c->op.q_offsets[s] + i) * c->ld_q + j];
                    sum += sizes ? fabs(value) : value;
                    size += fabs(value);
                }
                expect_within("sum", s * a->blocks + b, j, found, sum, size * (1e-5 + 2 * written) + 1e-6);
            }
}

/* The kernels themselves, with views of either type, and what they add up */
static void narrow_views(const narrow_shape *shape, apt_dtype type)
{
    narrow_case c;
    apti_attention_job job = APT_ZERO;
    narrow_begin(&c, shape, type == APT_BF16 ? APT_CUDA_BF16 : APT_CUDA_FP16, type == APT_BF16 ? 8 : 11);
    if (shape->halves) c.written = c.unit / 2;
    aptc_device *d = (aptc_device *)c.ctx->desc.backend->self;
    job.op = &c.op;
    aptc_attention a = aptc_attention_of(d, &job);
    a.q = narrow_view(&c, c.q, c.rows_q, c.ld_q, type);
    a.o = narrow_view(&c, c.o, c.rows_q, c.ld_q, type);
    a.d_o = narrow_view(&c, c.d_o, c.rows_q, c.ld_q, type);
    a.dq = narrow_view(&c, c.dq, c.rows_q, c.ld_q, type);
    a.k = narrow_view(&c, c.k, c.rows_k, c.ld_k, type);
    a.v = narrow_view(&c, c.v, c.rows_k, c.ld_k, type);
    a.dk = narrow_view(&c, c.dk, c.rows_k, c.ld_k, type);
    a.dv = narrow_view(&c, c.dv, c.rows_k, c.ld_k, type);
    const int64_t sequences = shape->sequences, pairs = sequences * shape->heads;
    assert_true(aptc_flash_choose(d, &a, true) && aptc_flash_choose(d, &a, false));
    a.blocks = aptc_ceil(c.longest_q, APTC_FLASH_ROWS);
    a.pairs = c.rows_q * shape->heads;
    const int64_t sums = aptc_sum_rows(&a) * shape->heads * shape->dim;
    float *dot = (float *)apti_data(c.ctx, a.pairs, 4), *sum[3];
    for (int32_t k = 0; k < 3; k++) sum[k] = (float *)apti_data(c.ctx, sums, 4);
    a.lse_out = c.lse;
    a.sizes = sum[0];
    a.sums = sum[1];
    APTC_LAUNCH_FLASH(d, aptc_flash_forward, a, a.blocks, pairs, aptc_flash_of(a.wide, false).bytes);
    a.lse = c.lse;
    a.dot_out = dot;
    APTC_LAUNCH(d, aptc_attention_dot_kernel, a, aptc_ceil(a.pairs, APTC_WARPS), 1);
    a.dot = dot;
    a.sizes = sum[2];
    a.sums = NULL;
    APTC_LAUNCH_FLASH(d, aptc_flash_dq, a, a.blocks, pairs, aptc_flash_of(a.wide, true).bytes);
    APTC_LAUNCH_FLASH(d, aptc_flash_dkv, a, aptc_ceil(c.longest_k, APTC_FLASH_ROWS), sequences * shape->kv, aptc_flash_of(a.wide, true).bytes);
    assert_int_equal(apti_device_check(c.ctx), APT_OK);
    float *const wide[] = {c.q, c.o, c.d_o, c.dq}, *const narrow[] = {c.k, c.v, c.dk, c.dv};
    const aptc_view *const wide_view[] = {&a.q, &a.o, &a.d_o, &a.dq}, *const narrow_views_of[] = {&a.k, &a.v, &a.dk, &a.dv};
    for (int32_t k = 0; k < 4; k++) {
        narrow_back(&c, wide_view[k], wide[k], c.rows_q, c.ld_q);
        narrow_back(&c, narrow_views_of[k], narrow[k], c.rows_k, c.ld_k);
    }
    narrow_check(&c);
    narrow_sums(&c, &a, c.o, sum[0], true, c.written);
    narrow_sums(&c, &a, c.o, sum[1], false, c.written);
    narrow_sums(&c, &a, c.d_o, sum[2], true, 0);
    apti_free(c.ctx, dot);
    for (int32_t k = 0; k < 3; k++) apti_free(c.ctx, sum[k]);
    narrow_end(&c);
}

/* Dims that are a width and not, lengths on both sides of what blocks, tiles and warps have, and everything else that changes what is
   seen or what it is multiplied by. */
static void test_attention_shapes(void **state)
{
    static const narrow_shape shapes[] = {
        /* heads, kv, dim, span, causal, masked, ends, halves, aligned */
        {2, 2, 64, 0, false, false, false, true, true, 5, {128, 1, 17, 64, 31}, {128, 1, 17, 64, 31}},
        {1, 1, 64, 0, true, false, false, true, true, 4, {129, 200, 127, 16}, {129, 200, 127, 16}},
        {2, 1, 5, 7, false, true, false, false, false, 5, {15, 64, 17, 2, 33}, {65, 64, 63, 1, 130}},
        {4, 2, 32, 0, true, true, false, true, true, 4, {63, 65, 1, 20}, {130, 64, 66, 40}},          /* more keys, and fewer */
        {2, 2, 40, 40, true, false, true, false, true, 4, {65, 1, 3, 128}, {65, 129, 2, 128}},
        {3, 3, 72, 20, true, true, false, true, true, 3, {33, 31, 130}, {33, 100, 130}},
        {4, 2, 128, 0, false, false, true, true, true, 3, {64, 1, 129}, {64, 127, 33}},
        {2, 1, 128, 9, true, true, false, false, true, 3, {34, 65, 10}, {34, 65, 3}},
        {2, 2, 20, 3, false, true, true, true, false, 3, {18, 40, 1}, {31, 97, 5}},
    };
    (void)state;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (size_t i = 0; i < 2; i += TEST_SAMPLE(2)) narrow_views(&shapes[k], (i + k) % 2 == 0 ? APT_BF16 : APT_F16);
}
#else
static void test_attention_shapes(void **state)
{
    (void)state;
    test_skip("the kernels belong to the other unit");
}
#endif

/* LoRA with products in float16 beside float32: nearly the same losses, by a factor that is there without being asked for. One
   that is too large finds its way down: those steps are left out, and so it is when only salience is gathered. */
static void test_fp16_run(void **state)
{
    (void)state;
    plan p = plan_at(0);
    apt_cuda_desc device = APT_ZERO;
    device.math = APT_CUDA_FP16;
    device.workspace_bytes = (size_t)8 << 20;
    for (int32_t k = 0; k < 2; k++) {
        live cpu, l;
        p.d.method = APT_METHOD_LORA;
        p.d.loss_scale = k == 0 ? 0.0f : 16777216.0f;
        begin(&cpu, &p, false);
        apt_train_desc found;
        begin_in(&l, &p, device_context(&device));
        apt_trainer_query(l.trainer, &found);
        assert_true(found.loss_scale == (k == 0 ? 65536.0f : 16777216.0f));
        int32_t skipped = 0;
        run(cpu.trainer, &p, &cpu.tr, 0, micro_batches(&p));
        for (int64_t i = 0; i < micro_batches(&p); i++) {
            run(l.trainer, &p, &l.tr, i, i + 1);
            skipped += l.trainer->info.skipped;
            if (k == 0 && fabs(cpu.tr.loss[i] - l.tr.loss[i]) > 5e-3 * (1 + fabs(cpu.tr.loss[i])))
                fail_msg("micro-batch %d has loss %.9g in float16, %.9g in float32", (int)i, l.tr.loss[i], cpu.tr.loss[i]);
        }
        assert_true(k == 0 ? skipped == 0 : skipped > 0 && skipped < 12);
        assert_true(k == 0 ? l.trainer->scaler.scale == 65536 : l.trainer->scaler.scale < 16777216);
        apt_destroy(cpu.ctx);
        apt_destroy(l.ctx);
    }
    p.d.method = APT_METHOD_APT;
    apt_ctx *ctx = device_context(&device);
    apt_model *model = test_model(ctx, &p.c, 1);
    apt_trainer *t = test_trainer(model, &p.d);
    test_batch b;
    test_batch_at(&b, &p.c, 3, 0, 5);
    assert_ok(ctx, apt_trainer_observe(t, &b.b));
    assert_true(t->scaler.scale < 16777216 && t->scaler.scale >= 1024);
    assert_ok(ctx, apt_trainer_prune_now(t, 0.5f));
    apt_destroy(ctx);
}

/* What the context has told of its passes (the trainer's, the teacher's, the model's) is taken back when their batches change. */
static void expect_few_ranges(const apt_ctx *ctx)
{
#if defined(APT_TEST_DEVICE)
    (void)ctx;
#else
    const aptc_device *d = (const aptc_device *)ctx->desc.backend->self;
    int32_t owned = 0, shared = 0;
    for (int32_t i = 0; i < APTC_RANGES; i++) {
        owned += d->owned[i].end != 0;
        shared += d->shared[i].end != 0;
    }
    if (owned < 1 || owned > 3 || shared != owned) fail_msg("%d ranges are owned and %d shared", (int)owned, (int)shared);
#endif
}

static void begin_bf16(live *l, const plan *p)
{
    apt_cuda_desc device = APT_ZERO;
    device.math = APT_CUDA_BF16;
    device.workspace_bytes = (size_t)8 << 20;
    begin_in(l, p, device_context(&device));
}

/* A forward makes floats of nothing but the hidden states, if they are wanted, which are nearly those of the CPU. */
static void compare_hidden(const live *cpu, const live *device, const plan *p)
{
    test_batch b;
    test_batch_at(&b, &p->c, p->data_seed, 0, p->sequences);
    const int64_t n = (int64_t)(p->c.decoder_layers > 0 ? b.b.target_offsets : b.offsets)[b.b.sequences] * p->c.hidden;
    float *hidden[2] = {(float *)test_memory_block((size_t)n * sizeof(float)), (float *)test_memory_block((size_t)n * sizeof(float))};
    double difference = 0, size = 0;
    for (int32_t k = 0; k < 2; k++) {
        const live *l = k == 0 ? cpu : device;
        apt_output out = APT_ZERO;
        assert_ok(l->ctx, apt_model_forward(l->model, &b.b, &out));
        if (k == 1) expect_widened(l->ctx, 0);
        out.hidden = hidden[k];
        out.hidden_capacity = n;
        assert_ok(l->ctx, apt_model_forward(l->model, &b.b, &out));
    }
    for (int64_t i = 0; i < n; i++) {
        difference += pow((double)hidden[0][i] - (double)hidden[1][i], 2);
        size += pow((double)hidden[0][i], 2);
    }
    if (difference > 4e-4 * size) fail_msg("hidden states: off by %g of their size", sqrt(difference / size));
    free(hidden[0]);
    free(hidden[1]);
}

/* Whole runs with products and activations in bfloat16, twice: the same bits. Without pruning, whose decisions need not be those of
   float32: losses beside those of float32, whether or not activations are kept, and no step makes floats of what it holds in
   bfloat16. */
static void test_bf16_run(void **state)
{
    (void)state;
    for (int32_t which = 0; which < 2 + TEST_DECODERS; which += TEST_SAMPLE(2))
        for (int32_t form = 0; form < 3; form++) {
            plan p = plan_at(which);
            live cpu, device, again;
            const bool prunes = form == 2;
            p.d.method = prunes ? APT_METHOD_APT : APT_METHOD_LORA;
            p.d.recompute = form == 1;
            begin(&cpu, &p, false);
            begin_bf16(&device, &p);
            begin_bf16(&again, &p);
            run(cpu.trainer, &p, &cpu.tr, 0, micro_batches(&p));
            run(device.trainer, &p, &device.tr, 0, micro_batches(&p));
            run(again.trainer, &p, &again.tr, 0, micro_batches(&p));
            for (int64_t i = 0; i < micro_batches(&p) && !prunes; i++)
                if (fabs(cpu.tr.loss[i] - device.tr.loss[i]) > 5e-3 * (1 + fabs(cpu.tr.loss[i])))
                    fail_msg("model %d, micro-batch %d has loss %.9g in bfloat16, %.9g in float32", (int)which, (int)i,
                             device.tr.loss[i], cpu.tr.loss[i]);
            expect_widened(device.ctx, 0);
            expect_few_ranges(device.ctx);
            if (!prunes) compare_hidden(&cpu, &device, &p);
            assert_same_trace(&device.tr, &again.tr, 0, micro_batches(&p), "twice");
            assert_true(test_model_sum(device.model) == test_model_sum(again.model));
            apt_destroy(cpu.ctx);
            apt_destroy(device.ctx);
            apt_destroy(again.ctx);
        }
}

static void expect_unsupported(apt_ctx *ctx, apt_result result, const char *what)
{
    assert_int_equal(result, APT_E_UNSUPPORTED);
    if (strstr(apt_error(ctx), what) == NULL || strstr(apt_error(ctx), "cuda") == NULL)
        fail_msg("expected '%s' and the device's name in '%s'", what, apt_error(ctx));
}

/* What has integer or sparse kernels on the CPU alone is refused with the device's name, and nothing is changed. */
static void test_cpu_only(void **state)
{
    (void)state;
    const plan p = plan_at(0);
    char dir[512];
    apt_ctx *cpu = (apt_create)(NULL), *ctx = device_context(NULL);
    apt_model *model = test_model(ctx, &p.c, 1), *small = test_model(cpu, &p.c, 1), *none = NULL;
    apt_quantize_desc quantize = APT_ZERO;
    quantize.kind = APT_QUANT_INT8;
    const uint64_t before = test_model_sum(model);
    expect_unsupported(ctx, apt_model_quantize(model, &quantize), "apt_model_quantize");
    expect_unsupported(ctx, apt_model_compress(model, 0, NULL), "apt_model_compress");
    apt_config c = p.c;
    c.quant = APT_QUANT_INT4;
    expect_unsupported(ctx, apt_model_create(ctx, &c, 1, &none), "config");
    apt_train_desc d = p.d;
    d.quantize = APT_QUANT_INT8;
    apt_trainer *trainer = NULL;
    expect_unsupported(ctx, apt_trainer_create(model, &d, &trainer), "apt_train_desc.quantize");
    assert_null(trainer);
    test_dir(dir, sizeof dir);
    assert_ok(cpu, apt_model_quantize(small, &quantize));
    assert_ok(cpu, apt_model_save(small, dir));
    expect_unsupported(ctx, apt_model_load(ctx, dir, NULL, &none), dir);
    assert_null(none);
    assert_true(test_model_sum(model) == before);
    apt_module *module = NULL;
    apt_moe_desc moe = APT_ZERO;
    apt_bk_core_desc core = APT_ZERO;
    apt_bk_layer_desc layer = APT_ZERO;
    core.hidden = moe.hidden = layer.moe.hidden = 8;
    expect_unsupported(ctx, apt_moe_create(ctx, &moe, &module), "apt_moe_create");
    expect_unsupported(ctx, apt_bk_core_create(ctx, &core, &module), "apt_bk_core_create");
    expect_unsupported(ctx, apt_bk_layer_create(ctx, &layer, &module), "apt_bk_layer_create");
    assert_null(module);
    test_remove(dir);
    apt_destroy(ctx);
    apt_destroy(cpu);
}

/* ---- graphs ---- */

/* Steps over batches of one shape, with other words in each; returns the checksum of the model behind the last one. share: of the
   launches in the last four steps, those that graphs have made; first: of those in the first two. */
static uint64_t run_one_shape(const plan *p, bool graphs, double *first, double *share)
{
    apt_cuda_desc device = APT_ZERO;
    live l;
    device.workspace_bytes = (size_t)16 << 20;
    device.no_graphs = !graphs;
    begin_in(&l, p, device_context(&device));
    int64_t before[2] = {0, 0}, after[2] = {0, 0};
    for (int64_t i = 0; i < micro_batches(p); i++) {
        test_batch b;
        apt_step_info info;
        test_batch_at(&b, &p->c, p->data_seed, 0, p->sequences);
        for (int32_t k = 0; k < b.b.offsets[p->sequences]; k++) b.tokens[k] = (int32_t)((b.tokens[k] + i) % p->c.vocab);
        l.tr.now = (int32_t)i;
        assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
        count_launches(l.ctx, after);
        if (i == 1) *first = (double)after[1] / (double)apti_max_i64(after[0], 1);
        if (i == micro_batches(p) - 5) memcpy(before, after, sizeof before);
    }
    *share = (double)(after[1] - before[1]) / (double)apti_max_i64(after[0] - before[0], 1);
    const uint64_t sum = test_model_sum(l.model);
    apt_destroy(l.ctx);
    return sum;
}

/* Steps that are like the one before are launched as graphs, also when shapes have changed on the way, and nothing else is
   different. */
static void test_graphs(void **state)
{
#if defined(APT_TEST_DEVICE)
    const bool counted = false;
#else
    const bool counted = true;
#endif
    (void)state;
    for (int32_t which = 0; which < 6; which += 2)                            /* BERT, T5, LLaMA */
        for (int32_t prune = which > 0; prune < 2; prune++) {
            plan p = plan_at(which);
            double first, share, none;
            p.d.accumulate = 1;
            p.d.evaluate_every = 0;
            p.d.checkpoint_every = 0;
            p.d.steps = prune ? 26 : 12;
            if (!prune) p.d.target_sparsity = 0;
            if (!prune) p.d.prune_end = 0;
            const uint64_t sum = run_one_shape(&p, true, &first, &share);
            assert_true(sum == run_one_shape(&p, false, &none, &none));
            assert_true(none == 0);
            assert_true(first == 0);
            if (share < 0.95 && counted) fail_msg("model %d, pruning %d: graphs make %.2f of the launches", which, prune, share);
        }
}

/* More rows of launches than there are places for graphs, in any order, broken off anywhere: each launch happens as often as it was
   asked for, and still a part of them comes from graphs. */
static void test_many_graphs(void **state)
{
    enum { GROUPS = 500, LENGTH = 6, CELLS = GROUPS * LENGTH, RUNS = 15000 };
    (void)state;
    apt_ctx *ctx = device_context(NULL);
    float *cell = (float *)apti_data(ctx, CELLS, 4), *one = (float *)apti_data(ctx, 1, 4);
    int32_t *asked = (int32_t *)test_memory_block(CELLS * sizeof(int32_t));
    apt_rng rng = apt_rng_make(17, 0);
    int64_t count[2];
    memset(cell, 0, CELLS * sizeof(float));
    memset(asked, 0, CELLS * sizeof(int32_t));
    *one = 1;
    for (int32_t i = 0; i < RUNS; i++) {
        const uint32_t group = apt_rng_below(&rng, 3) == 0 ? apt_rng_below(&rng, GROUPS) : apt_rng_below(&rng, 40);
        const uint32_t length = apt_rng_below(&rng, 4) == 0 ? 1 + apt_rng_below(&rng, LENGTH) : LENGTH;
        for (uint32_t k = group * LENGTH; k < group * LENGTH + length; k++) {
            apti_residual_job job = APT_ZERO;
            job.y = &cell[k];
            job.x = &cell[k];
            job.r = one;
            job.rows = job.n = 1;
            assert_true(apti_device_run(ctx, APTI_OP_RESIDUAL, &job));
            asked[k]++;
        }
        if (apt_rng_below(&rng, 50) == 0) assert_int_equal(apti_device_check(ctx), APT_OK);
    }
    assert_int_equal(apti_device_check(ctx), APT_OK);
    for (int32_t k = 0; k < CELLS; k++)
        if ((int32_t)cell[k] != asked[k]) fail_msg("launch %d happened %d times instead of %d", (int)k, (int)cell[k], (int)asked[k]);
    count_launches(ctx, count);
    if (count[0] > 0) assert_true(count[1] > count[0] / 10);
    free(asked);
    apti_free(ctx, cell);
    apti_free(ctx, one);
    apt_destroy(ctx);
}

/* ---- memory ---- */

/* What the device's allocator has handed out. */
typedef struct handed_block { struct handed_block *next, *last; size_t bytes; double align; } handed_block;
typedef struct handed { int64_t now, most; handed_block all; } handed;

static void *hand_out(size_t bytes, void *user)
{
    handed *h = (handed *)user;
    handed_block *b = (handed_block *)malloc(sizeof(handed_block) + bytes);
    if (b == NULL) return NULL;
    b->bytes = bytes;
    b->last = &h->all;
    b->next = h->all.next;
    if (b->next != NULL) b->next->last = b;
    h->all.next = b;
    h->now += (int64_t)bytes;
    if (h->now > h->most) h->most = h->now;
    return b + 1;
}

static void take_back(void *block, void *user)
{
    handed_block *b = (handed_block *)block - 1;
    ((handed *)user)->now -= (int64_t)b->bytes;
    b->last->next = b->next;
    if (b->next != NULL) b->next->last = b->last;
    free(b);
}

static apt_ctx *counted_context(handed *h)
{
    apt_cuda_desc device = APT_ZERO;
    memset(h, 0, sizeof *h);
    device.workspace_bytes = (size_t)8 << 20;
    device.alloc = hand_out;
    device.release = take_back;
    device.alloc_user = h;
    return device_context(&device);
}

#if !defined(APT_TEST_DEVICE)
/* What launches get: no address in a block of the CPU's own allocator, but for the context, which jobs carry for the CPU. Looked at
   is every word of a job but those that may be a bool in front of bytes that nobody has written; what else is in them, numbers
   apart, does not look like such an address. */
static struct { handed device, host; apt_ctx *ctx; apt_result (*sync)(void *, bool, char[APTI_BACKEND_MESSAGE]); int64_t addresses; } reach;

static bool lies_in(const handed *h, uintptr_t address)
{
    for (const handed_block *b = h->all.next; b != NULL; b = b->next)
        if (address - (uintptr_t)(b + 1) < b->bytes) return true;
    return false;
}

static apt_result sync_within_reach(void *self, bool look, char message[APTI_BACKEND_MESSAGE])
{
    aptc_device *d = (aptc_device *)self;
    aptc_issue_all(d);
    for (int32_t i = 0; i < d->queued; i++)
        for (size_t at = 0; at + sizeof(uintptr_t) <= d->queue[i].bytes; at += sizeof(uintptr_t)) {
            uintptr_t word;
            memcpy(&word, d->queue[i].job.bytes + at, sizeof word);
            if (word % 4 != 0 || (word & 255) <= 1 || word == (uintptr_t)reach.ctx) continue;
            if (lies_in(&reach.device, word)) reach.addresses++;
            else if (lies_in(&reach.host, word))
                fail_msg("launch %d: its job has the CPU's %p at byte %d", (int)i, (void *)word, (int)at);
        }
    return reach.sync(self, look, message);
}

static void reach_begin(live *l, const plan *p)
{
    char message[APTI_BACKEND_MESSAGE] = "";
    apt_cuda_desc device = APT_ZERO;
    apt_desc desc = APT_ZERO;
    memset(&reach.device, 0, sizeof reach.device);
    memset(&reach.host, 0, sizeof reach.host);
    device.workspace_bytes = (size_t)8 << 20;
    desc.threads = 1;
    device.alloc = desc.alloc = hand_out;
    device.release = desc.release = take_back;
    device.alloc_user = &reach.device;
    desc.alloc_user = &reach.host;
    desc.backend = apt_cuda_open(&device, message, sizeof message);
    assert_non_null(desc.backend);
    reach.sync = desc.backend->sync;
    desc.backend->sync = sync_within_reach;
    reach.ctx = (apt_create)(&desc);
    begin_in(l, p, reach.ctx);
}

/* Whole runs with all that belongs to them: training, checkpoints, observing, pruning at once, merging, forwards, generation. */
static void test_reach(void **state)
{
    (void)state;
    char dir[512], path[600];
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "run.apt");
    for (int32_t which = 0; which < 2 + TEST_DECODERS + 2; which++) {
        plan p = plan_at(which < 2 + TEST_DECODERS ? which : 0);
        if (which >= 2 + TEST_DECODERS) p.c = test_config(APT_BERT, which % 2 == 0 ? APT_TASK_MLM : APT_TASK_REGRESS);
        if (which >= 2 && which < 2 + TEST_DECODERS) p.d.adapt = 63 | APT_ADAPT_HEAD;
        live l;
        apt_output out = APT_ZERO;
        test_batch b;
        reach_begin(&l, &p);
        run(l.trainer, &p, &l.tr, 0, 21);
        assert_ok(l.ctx, apt_checkpoint_save(l.trainer, path, NULL, 0));
        apt_destroy(l.ctx);
        reach_begin(&l, &p);
        assert_ok(l.ctx, apt_checkpoint_load(l.trainer, path, NULL, NULL));
        run(l.trainer, &p, &l.tr, 21, micro_batches(&p));
        test_batch_at(&b, &p.c, p.data_seed, 0, p.sequences);
        assert_ok(l.ctx, apt_trainer_observe(l.trainer, &b.b));
        assert_ok(l.ctx, apt_trainer_prune_now(l.trainer, 0.7f));
        assert_ok(l.ctx, apt_model_forward(l.model, &b.b, &out));
        const int64_t hidden = (int64_t)(p.c.decoder_layers > 0 ? b.b.target_offsets : b.offsets)[b.b.sequences] * l.model->config.hidden;
        out.logits = (float *)test_memory_block((size_t)out.logits_count * sizeof(float));
        out.logits_capacity = out.logits_count;
        out.hidden = (float *)test_memory_block((size_t)hidden * sizeof(float));
        out.hidden_capacity = hidden;
        assert_ok(l.ctx, apt_model_forward(l.model, &b.b, &out));
        free(out.logits);
        free(out.hidden);
        apt_trainer_destroy(l.trainer);
        float difference;
        assert_ok(l.ctx, apt_model_merge(l.model, &b.b, &difference));
        for (int32_t beams = 1; beams < 3 && p.c.task == APT_TASK_LM; beams++) {
            apt_generate_desc d = APT_ZERO;
            int32_t tokens[64], lengths[16];
            d.max_tokens = 4;
            d.beams = beams;
            assert_true(b.b.sequences * 4 <= 64);
            assert_ok(l.ctx, apt_generate(l.model, &b.b, &d, tokens, lengths));
        }
        apt_destroy(l.ctx);
    }
    assert_true(reach.addresses > 10000);
    test_remove(dir);
}
#else
static void test_reach(void **state)
{
    (void)state;
    test_skip("launches do not wait in a queue");
}
#endif

/* The estimate of a device's memory beside what its allocator hands out, within 5 %, the workspace left out of both; with it the
   sum is what apt_memory_info says, which counts the CPU's share too. */
static void test_estimate(void **state)
{
    (void)state;
#if !defined(APT_TEST_DEVICE)
    static const char *const names[] = {"inference", "LoRA", "full", "APT", "APT without distillation"};
    for (int32_t k = 0; k < 10; k++) {
        const int32_t method = k % 5;
        handed h;
        apt_estimate_info info;
        apt_config c = k < 5 ? test_config(APT_BERT, APT_TASK_CLASSIFY) : test_decoder(2);
        c.vocab = 300;
        c.positions = 40;
        c.hidden = 64;
        c.heads = 4;
        c.kv_heads = 0;
        c.head_dim = 16;
        c.neurons = 160;
        apt_train_desc d = APT_ZERO;
        d.method = method == 1 ? APT_METHOD_LORA : method == 2 ? APT_METHOD_FULL : APT_METHOD_APT;
        d.steps = method < 3 ? 1 : 8;
        if (method >= 3) {
            d.target_sparsity = 0.6f;
            d.prune_begin = 1;
            d.prune_end = 7;
            d.update_frequency = 2;
            d.disable_distill = method == 4;
        }
        apt_ctx *ctx = counted_context(&h);
        const int64_t workspace = h.now - apti_block_of(ctx->device_sums)->total;
        assert_ok(ctx, apt_estimate(ctx, &c, method == 0 ? NULL : &d, 4 * 12, 4, &info));
        assert_true(workspace >= 8 << 20 && workspace == ctx->desc.backend->workspace);
        apt_model *m = test_model(ctx, &c, 1);
        test_batch b;
        apt_rng rng = apt_rng_make(3, 0);
        test_batch_fill(&b, &c, &rng, 4, 12, 12);
        if (method == 0) {
            apt_output out = APT_ZERO;
            assert_ok(ctx, apt_model_forward(m, &b.b, &out));
        } else {
            apt_trainer *t = test_trainer(m, &d);
            for (int64_t i = 0; i < d.steps; i++) assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));
            assert_ok(ctx, apt_trainer_finish(t));
        }
        const double taken = (double)(h.most - workspace), off = ((double)(info.device - workspace) - taken) / taken;
        if (fabs(off) > 0.05)
            fail_msg("%s, family %d: %lld bytes of the device estimated, %lld handed out", names[method], (int)c.family,
                     (long long)info.device, (long long)h.most);
        const double all = (double)apt_memory_info(ctx).peak_bytes;
        assert_true(fabs((double)info.total - all) <= 0.05 * (all - (double)workspace) && info.total > info.device);
        assert_true(info.scratch >= workspace);
        apt_destroy(ctx);
        assert_true(h.now == 0);
    }
#else
    test_skip("on a device this would only take longer");
#endif
}

static void expect_refused(const apt_cuda_desc *desc, const char *words)
{
    char message[APTI_BACKEND_MESSAGE] = "";
    assert_null(apt_cuda_open(desc, message, sizeof message));
    if (strstr(message, words) == NULL) fail_msg("expected '%s' in '%s'", words, message);
    assert_null(apt_cuda_open(desc, NULL, 0));
}

static void *give(size_t bytes, void *user)
{
    (void)user;
    return malloc(bytes);
}

static void test_open(void **state)
{
    (void)state;
    apt_cuda_desc desc = APT_ZERO;
    desc.end_canary = 1;
    expect_refused(&desc, "APT_ZERO");
    desc.end_canary = 0;
    desc.math = (apt_cuda_math)9;
    expect_refused(&desc, "math");
    desc.math = APT_CUDA_FP32;
    desc.workspace_bytes = 1000;
    expect_refused(&desc, "8 MiB");
    desc.workspace_bytes = 0;
    desc.alloc = give;
    expect_refused(&desc, "both or none");
    apt_desc bad = APT_ZERO;                     /* the backend belongs to apt_create also when that fails */
    test_log log;
    memset(&log, 0, sizeof log);
    bad.log = test_log_put;
    bad.log_user = &log;
    bad.threads = -1;
    bad.backend = apt_cuda_open(NULL, NULL, 0);
    assert_null((apt_create)(&bad));
}

/* A model, its trainer and a step, and away with them. */
static apt_result once(apt_ctx *ctx, const plan *p)
{
    apt_model *m = NULL;
    apt_trainer *t = NULL;
    test_batch b;
    test_batch_at(&b, &p->c, 5, 0, 20);
    apt_result r = apt_model_create(ctx, &p->c, 1, &m);
    if (r == APT_OK) r = apt_trainer_create(m, &p->d, &t);
    if (r == APT_OK) r = apt_trainer_step(t, &b.b, NULL);
    apt_trainer_destroy(t);
    apt_model_destroy(m);
    return r;
}

/* apt_cuda_desc.memory_bytes: what goes beyond it is an error like any other lack of memory; what was given back counts again. */
static void test_memory_limit(void **state)
{
    (void)state;
    const plan p = plan_at(0);
    int32_t refused = 0;
    for (size_t limit = (size_t)64 << 10, done = 0; !done; limit += limit / 4) {
        apt_cuda_desc device = APT_ZERO;
        device.workspace_bytes = (size_t)8 << 20;
        device.memory_bytes = limit;
        apt_ctx *ctx = device_context(&device);
        const apt_result r = once(ctx, &p);
        if (r == APT_OK) done = 1;
        else {
            assert_int_equal(r, APT_E_MEMORY);
            refused++;
        }
        for (int32_t again = 0; again < 3; again++) assert_int_equal(once(ctx, &p), r);
        apt_destroy(ctx);
    }
    assert_true(refused > 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_run),
        cmocka_unit_test(test_compaction),
        cmocka_unit_test(test_compaction_memory),
        cmocka_unit_test(test_across),
        cmocka_unit_test(test_float16),
        cmocka_unit_test(test_narrow_products),
        cmocka_unit_test(test_kept_operands),
        cmocka_unit_test(test_owned),
        cmocka_unit_test(test_owned_products),
        cmocka_unit_test(test_sums_inside),
        cmocka_unit_test(test_sums_many_rows),
        cmocka_unit_test(test_norm_room),
        cmocka_unit_test(test_narrow_attention),
        cmocka_unit_test(test_bf16_run),
        cmocka_unit_test(test_attention_shapes),
        cmocka_unit_test(test_fp16_run),
        cmocka_unit_test(test_cpu_only),
        cmocka_unit_test(test_graphs),
        cmocka_unit_test(test_many_graphs),
        cmocka_unit_test(test_estimate),
        cmocka_unit_test(test_reach),
        cmocka_unit_test(test_memory_limit),
        cmocka_unit_test(test_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
