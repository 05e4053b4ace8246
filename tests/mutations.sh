#!/usr/bin/env bash
# Can the tests fail? Zeroes one gradient (or statistic, or step of the method) at a time in a copy of apt.h and expects some test
# to turn red. Not part of `make test`: every mutant is compiled anew, some ten minutes in all.
#
# usage: tests/mutations.sh [-k REGEX] [-c]     -k: only mutants whose name matches; -c: only looks whether each text still stands
#                                               exactly once in apt.h (this much is part of `make test`)
#
# A line of the table: name | tests that should notice | text that stands once in apt.h | what replaces it
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} FILTER=. CHECK=
while getopts k:c option; do
    case $option in
        k) FILTER=$OPTARG ;;
        c) CHECK=1 ;;
        *) exit 2 ;;
    esac
done
WORK=$PWD/build/mutations${CHECK:+-check}
rm -rf "$WORK"
mkdir -p "$WORK/tests" "$WORK/tmp"
cp tests/test_*.c tests/*.h "$WORK/tests/"                     # they include ../apt.h and so find the mutant
export APT_TEST_TMP=$WORK/tmp APT_SHARED=${APT_SHARED:-$PWD/../shared}

table() {
    cat << 'END'
quantised product: the bias and what follows | quantize | apti_gemm_place(&f, g, i, j0); | f.c = g->c + i * g->ldc + j0; f.ldc = g->ldc; f.act = -1;
quantised product: the scale of a row | quantize | f.row_scale = block->scale + r0; | f.row_scale = block->scale;
quantised product: the scratch of wide rows | quantize | strips > 0 ? apti_min_i64(APTI_QUANT_ROWS, strips) : apti_max_i64(1, fit) | apti_min_i64(APTI_QUANT_ROWS, apti_max_i64(strips, quant->mr))
quantised model: calibration | quantize | if (op->squares != NULL) apti_column_square_sum | if (0) apti_column_square_sum
quantised model: what it is | quantize | model->config.quant = desc->kind; | model->config.quant = 0;
quantised training: what a pass multiplies with | quantize_train | op.w = op.folded ? &w->rounded : &w->packed; | op.w = &w->packed;
quantised training: dW from narrowed rows | quantize_train | if (op.folded && rows > 0 && (op.rank > 0 | if (op.folded && rows > 0 && grad.w == NULL && (op.rank > 0
quantised training: dx through the integers | quantize_train | apti_quant_widen(y, nr, part->packed, p0, k, j, cols); | apti_quant_widen(y, nr, part->packed, p0, k, 0, cols);
quantised training: integers behind an update | quantize_train | if (t->model->stale == APTI_STALE_NONE) t->model->stale | if (0) t->model->stale
quantised training: where it begins | quantize_train | t->step >= t->desc.quantize_begin ? | t->step > t->desc.quantize_begin ?
quantised training: its memory | estimate | apti_note(r, APTI_USE_WEIGHTS, r->rounded); | apti_note(r, APTI_USE_WEIGHTS, 0);
fake quantisation: what was cut off | quantize | if (fabsf(w[i]) > most) job->out | if (0) job->out
int4: the half of a byte | quantize | inside >= half ? 4 : 0; | inside >= half ? 0 : 4;
compressed map: the bias | sparsify | apti_sparse_run(m->ctx, sparse, op.bias, y | apti_sparse_run(m->ctx, sparse, NULL, y
estimate of masks | estimate | apti_note(r, APTI_USE_MASKS, masks); | apti_note(r, APTI_USE_MASKS, 0 * masks);
linear dx | ops model | apti_gemm_packed(&g.part[0], APTI_B_PACKED_T, op->w); | apti_gemm_packed(&g.part[0], APTI_B_PACKED_T, op->w); g.part[0].k = 0;
linear dx of the adapter | ops model | apti_gemm_left(&g.part[1], dya, op->rank, op->rank); | apti_gemm_left(&g.part[1], dya, op->rank, 0);
linear dW | ops model | if (grad->w) apti_weight_grad(ctx, grad->w, op->out | if (0) apti_weight_grad(ctx, grad->w, op->out
linear dbias | ops model | if (grad->bias) apti_column_sum(ctx, grad->bias, dy | if (0) apti_column_sum(ctx, grad->bias, dy
linear dB | ops model | if (adapter && grad->b) apti_weight_grad | if (0) apti_weight_grad
linear dA | ops model | if (adapter && grad->a) apti_weight_grad | if (0) apti_weight_grad
loss scale: halved | train | if (!finite) apti_scaler_halve(t); | if (!finite) {}
loss scale: the sums of salience | train | apti_scale_run(t->ctx, t->probe.grad, apti_probe_count | if (0) apti_scale_run(t->ctx, t->probe.grad, apti_probe_count
loss scale: in a checkpoint | train | if (apti_is_scaled(t)) (void)apti_ckpt_put_copy | if (0) (void)apti_ckpt_put_copy
loss scale: inside an accumulation | train | if (t->micro > 0) apti_gradients_scale | if (0) apti_gradients_scale
adapter scale | ops model | apti_scale_run(ctx, xa, rows * op->rank, op->scale); | (void)0;
layernorm dgamma | ops model | if (dgamma) apti_fold_run | if (0) apti_fold_run
layernorm dbeta | ops model | if (dbeta) apti_fold_run | if (0) apti_fold_run
layernorm dz: the mean | ops model | kernels->norm(dz, dz, alive->keep, alive->zeros, average, rstd, d); | kernels->norm(dz, dz, alive->keep, alive->zeros, 0 * average, rstd, d);
layernorm dz: the slope | ops model | kernels->axpy(dz, -slope, alive->x, d); | (void)slope;
layernorm statistics over alive dimensions | ops structure | if (m != 0.0f) alive->index[alive->n++] | if (1) alive->index[alive->n++]
attention dv | ops model | if (want_k && job->dv) | if (0)
attention dk | ops model | if (want_k && job->dk) | if (0)
attention dq | ops model | if (want_q && job->dq) | if (0)
attention: dP - dot | ops model | t->kernels->norm(ds, ds, t->s + i * t->lds, t->zeros, t->dot[i], factor, width); | t->kernels->norm(ds, ds, t->s + i * t->lds, t->zeros, 0 * t->dot[i], factor, width);
attention dbias | ops | table[apti_attn_distance(t, u)] += t->d_diagonal[u]; | table[apti_attn_distance(t, u)] += 0 * t->d_diagonal[u];
attention head mask | ops | t->kernels->scale(t->acc + i * dim, d_o + i * job->lddo, mask, dim); | t->kernels->scale(t->acc + i * dim, d_o + i * job->lddo, 1.0f, dim);
activation slope | ops model | job->kernels->act_grad(du, da, job->pre + i * job->ld_pre, job->n, job->act); | memcpy(du, da, (size_t)job->n * sizeof(float));
column mask | ops train | if (job->mask) job->kernels->mul(du, da, job->mask, job->n); | if (job->mask) memmove(du, da, (size_t)job->n * sizeof(float));
gate: the other map | ops model | kernels->mul(dv, dv, dh, job->n); | memset(dv, 0, (size_t)job->n * sizeof(float));
gate: the slope | ops model | kernels->act_grad(du, du, u, job->n, job->act); | (void)u;
rotary | ops model | apti_rotary_run(ctx, op, dx, lddx, rows, -1.0f); | (void)dx;
relative position table | ops model | apti_relative_backward(m->ctx, &relative, table->grad, dbias); | (void)relative;
tanh | ops model | job->dy[i] * (1.0f - job->x[i] * job->x[i]) | job->dy[i]
embeddings | ops | if (dtable) apti_scatter_run | if (0) apti_scatter_run
word embedding | model | if (e[k] != NULL) apti_embed_backward | if (e[k] != NULL && k != APTI_WORD) apti_embed_backward
position embedding | model | if (e[k] != NULL) apti_embed_backward | if (e[k] != NULL && k != APTI_POSITION) apti_embed_backward
type embedding | model | if (e[k] != NULL) apti_embed_backward | if (e[k] != NULL && k != APTI_TYPE) apti_embed_backward
cross entropy at the label | ops model | dx[label] = (float)((double)dx[label] - weight); | (void)0;
regression | ops model | (float)(2.0 * (double)grad_scale * difference / (double)n) | (float)(1.0 * (double)grad_scale * difference / (double)n)
span | ops model | (i == label ? 1.0 : 0.0)) : nan) | 0.0) : nan)
mlm dE | ops | if (grad->w) apti_weight_grad(ctx, grad->w, op->head.out | if (0) apti_weight_grad(ctx, grad->w, op->head.out
mlm dbias | ops | if (grad->bias) apti_column_sum(ctx, grad->bias, dlogits | if (0) apti_column_sum(ctx, grad->bias, dlogits
probe of activations | model | p->probe->act + at, x, ld, rows, n); | p->probe->act + at, x, ld, rows / 2, n);
probe of gradients | model | p->probe->grad + at, x, ld, rows, n); | p->probe->grad + at, x, ld, rows / 2, n);
core adapter dA | core | if (da != NULL) apti_axpy_plain | if (0) apti_axpy_plain
core adapter dB | core | if (db != NULL) apti_axpy_plain | if (0) apti_axpy_plain
core adapter dx | core | if (dx != NULL) apti_axpy_plain | if (0) apti_axpy_plain
layer loss: its gradient | train | j->dy[r * j->ld + i] += m[j->place[i]]; | (void)0;
layer loss: dB of Tr | train | apti_plain_product(ctx, tr->b.grad, k, true, dt, k, rows | if (0) apti_plain_product(ctx, tr->b.grad, k, true, dt, k, rows
layer loss: dA of Tr | train | apti_plain_product(ctx, tr->a.grad, d, true, k, d, rows | if (0) apti_plain_product(ctx, tr->a.grad, d, true, k, d, rows
layer loss: through Tr | train | apti_plain_product(ctx, dy, ld, true, rows, d, k | if (0) apti_plain_product(ctx, dy, ld, true, rows, d, k
teacher: its share of the loss | distill | x.mu = t->external.alpha; | x.mu = 0.5f;
teacher: the temperature | distill | x.temperature = t->external.temperature; | x.temperature = 1;
teacher: gradient over the vocabulary | distill | apti_lm_grads(t->ctx, &x, s->dhead + first | if (0) apti_lm_grads(t->ctx, &x, s->dhead + first
teacher: what tells it apart | distill | sum = apti_checksum(sum, m->shape, (size_t)c->layers | if (0) sum = apti_checksum(sum, m->shape, (size_t)c->layers
clipping | train | clip > 0 && norm > clip ? clip / norm : 1.0 | 1.0
learning-rate schedule | train | return d->learning_rate * (1 - done); | return d->learning_rate;
bias correction | train | c1 = 1 - pow(d->beta1, n) | c1 = 1
masks glide | train | (void)apt_mask_step(t->model->masks, t->keep, u.total, t->desc.mask_step); | (void)0;
salience average | train | r = apt_salience_ema(t->salience, now, u.total, t->desc.salience_momentum); | (void)now;
growth of the upper half | train | if (site.a->rows == 0) continue; | if (0) continue;
a head that is untied keeps T5's scale | structure | if (m->config.scaled_head) m->ctx->kernels->scale(values, values | if (0) m->ctx->kernels->scale(values, values
word embeddings of an untied head | structure | apti_param_get(m, site.w, u->word.value); | (void)0;
adapter importance | train | r = apt_salience_ema(&t->importance[k], &now, 1, t->desc.salience_momentum); | (void)now;
BK-core dv from the left | learned | a[t + l] = r_re[t + l] + in_re; | a[t + l] = r_re[t + l];
BK-core from the right | learned | const float drr = dqr + in_re[l], dri = dqi + in_im[l]; | const float drr = dqr, dri = dqi;
BK-core dmask | learned | if (p > 0) dm[p] += dc[t * APTI_BK_LANES] * m[p - 1]; | (void)0;
BK-core dz | learned | sum[1] += (double)g->x[6][at + t * APTI_BK_LANES]; | sum[1] += 0;
BK-core pieces overlap | learned | const double overlap = log(2e9 * (1 + 1 / (y * y))) / decay; | const double overlap = 4;
BK-core masked positions | learned | to[t * APTI_BK_LANES] = x[at + t - 1] * x[at + t]; | to[t * APTI_BK_LANES] = x[at + t];
sparsity loss: its slope | learned | const float each = (float)(-(double)grad_scale * slope | const float each = (float)((double)grad_scale * slope
sparsity loss: Huber far away | learned | *slope = near ? e : e > 0 ? APTI_HUBER_DELTA : -APTI_HUBER_DELTA; | *slope = e;
sparsity loss: KL | learned | if (s >= edge && s <= 1 - edge) *slope = e / (q * (1 - q)); | (void)q;
pressure is eased | learned | s->weight = (float)(s->eased != 0 ? 0.5 * weight : weight); | s->weight = (float)weight;
mask: through what the convolutions read | learned_modules | df * (g - c->h[APTI_CONVS][from + 2 * i + k]) + dh * g; | df * (g - c->h[APTI_CONVS][from + 2 * i + k]);
mask: through the cut | learned_modules | apt_bk_backward_threads(c->base.ctx, dv, c->dm, NULL | apt_bk_backward_threads(c->base.ctx, dv, NULL, NULL
importance: the temperature | learned_modules | c->u[i] = c->dm[i] * c->p[i] * (1 - c->p[i]) / c->temperature; | c->u[i] = c->dm[i] * c->p[i] * (1 - c->p[i]);
interpolation: turned weights | learned_modules | w->value + o * w->cols + (2 - t) * in | w->value + o * w->cols + t * in
interpolation: the slope | learned_modules | if (i > 0) apti_act_backward(c->base.ctx, dx + in | if (0) apti_act_backward(c->base.ctx, dx + in
experts: the gate | learned_modules | ((double)w[i] * ((double)dw[i] - mean)); | ((double)w[i] * (double)dw[i]);
experts: dx of the gate | learned_modules | apti_map_input(ctx, dx, accumulate, moe->logits | apti_map_input(ctx, dx, accumulate, moe->weight
BK layer: the scale | learned_modules | scale->grad[0] += (float)apti_ops_dot(kernels, dy, l->s, rows * d); | (void)0;
BK layer: clamped potential | learned_modules | apti_clamp_backward(l->dv, l->raw_v, rows, APTI_POTENTIAL_LIMIT); | (void)0;
BK layer: clamped features | learned_modules | apti_clamp_backward(l->df, l->raw_f, 2 * rows, APTI_FEATURE_LIMIT); | (void)0;
BK layer: the potential's way to the experts | learned_modules | apti_map_input(module->ctx, l->de, true, l->dv | if (0) apti_map_input(module->ctx, l->de, true, l->dv
removal: the optimizer's state of the gate | learned_modules | memmove(all[i] + rows * gate->cols | if (i < 2) memmove(all[i] + rows * gate->cols
saved modules: number of draws | learned_modules | apti_field_bits(c, &head->draw, 8); | c->at += 8;
saved modules: usage | learned_modules | apti_field_i64(c, &head->count[e]); | c->at += 8;
a part used by itself | learned_modules | if (m->owner != NULL) m->owner->live = false; | (void)0;
END
}

# Replaces text that must stand exactly once.
mutate() {                                       # FROM TO
    FROM=$1 TO=$2 awk '
        BEGIN { from = ENVIRON["FROM"]; to = ENVIRON["TO"] }
        { at = index($0, from)
          if (at) { n++; $0 = substr($0, 1, at - 1) to substr($0, at + length(from)) }
          print }
        END { exit n != 1 }' apt.h > "$WORK/apt.h"
}

# Prints the test program that turned red, or nothing.
red() {                                          # TESTS
    local t
    for t in $1; do
        $CC -O1 -w -std=c11 "$WORK/tests/test_$t.c" -o "$WORK/test" -lcmocka -lutf8proc -lm -pthread || { echo "does not compile"; return; }
        timeout 300 "$WORK/test" > "$WORK/log" 2>&1 || { echo "$t"; return; }
    done
}

killed=0 survived=0
cp apt.h "$WORK/apt.h"
for t in ops model core train structure learned learned_modules quantize quantize_train; do
    [ -n "$CHECK" ] || [ -z "$(red $t)" ] || { echo "test_$t fails without any mutation"; exit 1; }
done
while IFS='|' read -r name tests from to; do
    name=${name% } tests=${tests## } from=${from# } to=${to# }
    [[ $name =~ $FILTER ]] || continue
    if ! mutate "${from% }" "$to"; then echo "FAILED   $name: its text does not stand exactly once in apt.h"; survived=$((survived + 1)); continue; fi
    if [ -n "$CHECK" ]; then killed=$((killed + 1)); continue; fi
    by=$(red "$tests")
    if [ "$by" = "does not compile" ]; then echo "FAILED   $name: does not compile, which no test noticed"; survived=$((survived + 1))
    elif [ -n "$by" ]; then printf 'ok       %-45s noticed by %s\n' "$name" "$by"; killed=$((killed + 1))
    else echo "FAILED   $name: no test noticed"; survived=$((survived + 1)); fi
done < <(table)
rm -rf "$WORK"
printf '%d passed, %d failed\n' $killed $survived
[ $survived -eq 0 ]
