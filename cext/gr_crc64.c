#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <wmmintrin.h>

#include "gr_crc64.h"
#include "gr_internal.h"

/*
 * Polynomials stand reflected: the lowest bit of a word is its highest power of x. Carry-less multiplication of two such
 * words gives their product times x, which is why the powers below are one less than they seem.
 */
#define POLYNOMIAL 0x9a6c9329ac4bc9b5UL
#define ONE (1UL << 63)
#define LANES 4
/* Stays in a core's second cache between being read and being summed. */
#define READ_BYTES (256UL << 10)

static uint64_t table[256];
static uint64_t fold_lanes[2], fold_one[2]; /* what moves the low and the high word of a lane on */
static int has_clmul;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

static uint64_t times_x(uint64_t a)
{
	return (a >> 1) ^ (a & 1 ? POLYNOMIAL : 0);
}

static uint64_t x_to(unsigned int power)
{
	uint64_t a = ONE;

	while (power--)
		a = times_x(a);
	return a;
}

static void prepare(void)
{
	for (unsigned int byte = 0; byte < 256; byte++) {
		table[byte] = byte;
		for (int bit = 0; bit < 8; bit++)
			table[byte] = times_x(table[byte]);
	}
	fold_lanes[0] = x_to(LANES * 128 + 64 - 1);
	fold_lanes[1] = x_to(LANES * 128 - 1);
	fold_one[0] = x_to(128 + 64 - 1);
	fold_one[1] = x_to(128 - 1);
	has_clmul = __builtin_cpu_supports("pclmul");
}

static uint64_t by_bytes(uint64_t state, const unsigned char *at, uint64_t bytes)
{
	while (bytes--)
		state = table[(state ^ *at++) & 0xff] ^ (state >> 8);
	return state;
}

/* The lane times a power of x, reduced to its width, plus what stands there. */
__attribute__((target("pclmul"))) static inline __m128i fold(__m128i lane, __m128i powers, __m128i next)
{
	return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(lane, powers, 0x00),
					   _mm_clmulepi64_si128(lane, powers, 0x11)),
			     next);
}

/* `bytes` is a multiple of 64 and not 0. */
__attribute__((target("pclmul"))) static uint64_t by_lanes(uint64_t state, const unsigned char *at, uint64_t bytes)
{
	const __m128i *in = (const __m128i *)at, *end = (const __m128i *)(at + bytes);
	const __m128i far = _mm_loadu_si128((const __m128i *)fold_lanes);
	const __m128i near = _mm_loadu_si128((const __m128i *)fold_one);
	__m128i a = _mm_xor_si128(_mm_loadu_si128(in), _mm_cvtsi64_si128((long long)state));
	__m128i b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
	unsigned char left[16];

	for (in += LANES; in < end; in += LANES) {
		a = fold(a, far, _mm_loadu_si128(in));
		b = fold(b, far, _mm_loadu_si128(in + 1));
		c = fold(c, far, _mm_loadu_si128(in + 2));
		d = fold(d, far, _mm_loadu_si128(in + 3));
	}
	d = fold(fold(fold(a, near, b), near, c), near, d);
	_mm_storeu_si128((__m128i *)left, d);
	return by_bytes(0, left, sizeof(left));
}

uint64_t gr_crc64(uint64_t crc, const void *data, uint64_t bytes)
{
	const unsigned char *at = data;
	uint64_t state = ~crc, whole = bytes & ~(LANES * 16UL - 1);

	pthread_once(&prepared, prepare);
	if (has_clmul && whole) {
		state = by_lanes(state, at, whole);
		at += whole;
		bytes -= whole;
	}
	return ~by_bytes(state, at, bytes);
}

static uint64_t multiply(uint64_t a, uint64_t b)
{
	uint64_t product = 0;

	for (; a; a <<= 1, b = times_x(b))
		if (a & ONE)
			product ^= b;
	return product;
}

uint64_t gr_crc64_combine(uint64_t first, uint64_t second, uint64_t second_bytes)
{
	uint64_t square = x_to(8);

	for (; second_bytes; second_bytes >>= 1, square = multiply(square, square))
		if (second_bytes & 1)
			first = multiply(first, square);
	return first ^ second;
}

int gr_crc64_file(int fd, uint64_t offset, uint64_t bytes, uint64_t *crc, struct gr_error *err)
{
	char *buffer = malloc(READ_BYTES);
	int ret = buffer ? 0 : gr_fail(err, ENOMEM, "making room to read");

	while (bytes && ret == 0) {
		ssize_t n = pread(fd, buffer, bytes < READ_BYTES ? bytes : READ_BYTES, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			ret = gr_fail(err, n < 0 ? errno : ENODATA, "reading at byte %lu", offset);
			break;
		}
		*crc = gr_crc64(*crc, buffer, (uint64_t)n);
		offset += (uint64_t)n;
		bytes -= (uint64_t)n;
	}
	free(buffer);
	return ret;
}
