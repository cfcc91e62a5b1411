/* Functions of 16 numbers in one AVX-512 vector, with PyTorch's roundings to bf16. */
#ifndef CM_LANES_H
#define CM_LANES_H

INLINE __m512 exp_lanes(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718f), x);
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* 2 to the power of x, of 0 or less, to 13 bits: for what is rounded to bf16. NaN stays NaN. */
INLINE __m512 exp2_lanes(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(5.50088928e-02f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.42211028e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93282938e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* 1 / x, to 24 bits */
INLINE __m512 invert_lanes(__m512 x) {
    __m512 guess = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}

/* x / (1 + exp(-slope)) */
INLINE __m512 gate_lanes(__m512 x, __m512 slope) {
    __m512 below = exp_lanes(_mm512_sub_ps(_mm512_setzero_ps(), slope));
    return _mm512_mul_ps(x, invert_lanes(_mm512_add_ps(below, _mm512_set1_ps(1.0f))));
}

/* 1 - erf(x) of 0 or more, to 1.5e-7 (Abramowitz and Stegun, 7.1.26) */
INLINE __m512 erfc_lanes(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), sum = _mm512_set1_ps(1.061405429f);
    x = _mm512_min_ps(_mm512_set1_ps(10.0f), x); /* nothing is left behind it; NaN stays NaN */
    __m512 t = invert_lanes(_mm512_fmadd_ps(x, _mm512_set1_ps(0.3275911f), one));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    __m512 below = exp_lanes(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(x, x)));
    return _mm512_mul_ps(_mm512_mul_ps(sum, t), below);
}

/* x / 2 * (1 + erf(x / sqrt(2))) */
INLINE __m512 gelu_lanes(__m512 x) {
    __m512 beyond = erfc_lanes(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f)));
    __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    beyond = _mm512_mask_sub_ps(beyond, above, _mm512_set1_ps(2.0f), beyond);
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), beyond);
}

/* x * sigmoid(1.702 * x), in three operators */
INLINE __m512 quick_gelu_lanes(__m512 x) {
    __m512 slope = round_bf16(_mm512_mul_ps(x, _mm512_set1_ps(1.702f)));
    return _mm512_mul_ps(x, round_bf16(gate_lanes(_mm512_set1_ps(1.0f), slope)));
}

/* The activation of 16 numbers, rounded as PyTorch's operators round it */
INLINE __m512 activate_lanes(__m512 x, int64_t activation) {
    if (activation == SILU) return round_bf16(gate_lanes(x, x));
    if (activation == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x); /* NaN stays */
    if (activation == GELU_TANH) {
        __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
        __m512 slope = _mm512_mul_ps(_mm512_fmadd_ps(cubic, x, x), _mm512_set1_ps(1.59576912f));
        return round_bf16(gate_lanes(x, slope));
    }
    return round_bf16(activation == GELU ? gelu_lanes(x) : quick_gelu_lanes(x));
}

#endif
