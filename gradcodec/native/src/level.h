/* Everything of one level: each level_*.c chooses instructions and vectors and includes this. */
#include "levels.h"
#include "vectors.h"

#include "floats.h"
#include "bits.h"
#include "grid.h"
#include "philox.h"
#include "hadamard.h"
#include "decode.h"
#include "encode.h"
#include "topk.h"
#include "lloyd.h"
#include "rotsign.h"

#define JOINED(a, b) a##b
#define TABLE(name) JOINED(gradcodec_, name)
#define TEXT(name) TEXT_OF(name)
#define TEXT_OF(name) #name

const struct level TABLE(LEVEL) = {
    TEXT(LEVEL), random_bytes, encode, decode, topk, rows, sparse_mean, lloyd, lloyd_mean, rotsign,
    rotsign_mean,
};
