"""The codec families, one per file; ``base`` says what a codec is, ``registry`` lists them."""
