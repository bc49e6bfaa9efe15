# One word per operator and per method; every other file list is derived from these.
set(SUBQUAD_OPERATORS
  random
  lsh_hash
  bucket_sort
  bucket_attention
  bucket_gradient
  collision_attention
  l2_normalize)
set(SUBQUAD_METHODS
  yoso_attention)
# Operators with an own AMX kernel in cpu/amx.
set(SUBQUAD_AMX_OPERATORS
  collision_attention)
