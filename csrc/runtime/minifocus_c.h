/* minifocus for C, and for languages that bind to it: minifocus.h as functions. Strings are UTF-8.
 *
 * A function that fails returns NULL; minifocus_error then tells the reason, until the same thread calls again. What a function
 * returns is the caller's to free with the function named for it. */
#ifndef MINIFOCUS_C_H
#define MINIFOCUS_C_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef MINIFOCUS_API
#define MINIFOCUS_API __attribute__((visibility("default")))
#endif

typedef struct minifocus_model minifocus_model;
typedef struct minifocus_request minifocus_request;
typedef struct minifocus_answer minifocus_answer;

/* Called with each piece of text, which is not valid afterwards. 0 ends the answer. */
typedef int (*minifocus_on_text)(const char* text, void* context);

/* A question, asked as the package says. minifocus_request_set changes "sampler", "gamma", "keep", "layer" or "max_new_tokens",
 * the value as text, and returns 0 for a name or value that is none. */
MINIFOCUS_API minifocus_request* minifocus_request_new(const char* question);
MINIFOCUS_API int minifocus_request_set(minifocus_request* request, const char* name, const char* value);
MINIFOCUS_API void minifocus_request_on_text(minifocus_request* request, minifocus_on_text on_text, void* context);
MINIFOCUS_API void minifocus_request_free(minifocus_request* request);

/* workers: see OpenOptions; check_weights: 0 or 1. */
MINIFOCUS_API minifocus_model* minifocus_open(const char* package, int workers, int check_weights);
MINIFOCUS_API void minifocus_close(minifocus_model* model);

/* About a PNG or JPEG; about decoded pixels, red, green and blue, `stride` bytes to a row (0: 3 * width); about no picture. */
MINIFOCUS_API minifocus_answer* minifocus_ask_encoded(const minifocus_model* model, const uint8_t* bytes, size_t count,
                                                      const minifocus_request* request);
MINIFOCUS_API minifocus_answer* minifocus_ask_rgb(const minifocus_model* model, const uint8_t* pixels, int64_t height,
                                                  int64_t width, int64_t stride, const minifocus_request* request);
MINIFOCUS_API minifocus_answer* minifocus_ask_text(const minifocus_model* model, const minifocus_request* request);

MINIFOCUS_API const char* minifocus_answer_text(const minifocus_answer* answer);
MINIFOCUS_API const char* minifocus_answer_finish(const minifocus_answer* answer); /* "stop", "length" or "cancelled" */
MINIFOCUS_API const int64_t* minifocus_answer_tokens(const minifocus_answer* answer, size_t* count);
MINIFOCUS_API const int64_t* minifocus_answer_layer_tokens(const minifocus_answer* answer, size_t* count);
/* Visual tokens: full, after_vision, after_text, and in `equivalent` the mean over layers as a fraction of full. */
MINIFOCUS_API void minifocus_answer_counts(const minifocus_answer* answer, int64_t counts[3], double* equivalent);
MINIFOCUS_API void minifocus_answer_seconds(const minifocus_answer* answer, double* prefill, double* decode);
MINIFOCUS_API void minifocus_answer_free(minifocus_answer* answer);

MINIFOCUS_API const char* minifocus_error(void);
MINIFOCUS_API void minifocus_set_num_threads(int count);

#ifdef __cplusplus
}
#endif

#endif
