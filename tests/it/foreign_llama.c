/* A library with llama.cpp's functions, whose default values stand elsewhere than in any build
   that is known. Any other call than for these ends the program. */
#include <stdlib.h>
#include <string.h>

struct words { unsigned int word[40]; };

struct words llama_model_default_params(void) {
    struct words words;
    memset(&words, 0, sizeof words);
    words.word[5] = 1;
    return words;
}

struct words llama_context_default_params(void) {
    struct words words;
    memset(&words, 0, sizeof words);
    words.word[0] = 512;
    words.word[1] = 4096;
    return words;
}

#define CALLED(name) void name(void) { abort(); }
CALLED(ggml_get_name)
CALLED(ggml_op_desc)
CALLED(ggml_nbytes)
CALLED(ggml_backend_tensor_get)
CALLED(ggml_backend_load_all_from_path)
CALLED(llama_log_set)
CALLED(llama_backend_init)
CALLED(llama_model_load_from_file)
CALLED(llama_model_free)
CALLED(llama_init_from_model)
CALLED(llama_free)
CALLED(llama_model_get_vocab)
CALLED(llama_vocab_n_tokens)
CALLED(llama_batch_init)
CALLED(llama_batch_free)
CALLED(llama_decode)
#ifndef OLDER
CALLED(llama_get_logits_ith)
#endif
