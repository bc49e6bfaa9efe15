class UnsupportedError(NotImplementedError):
    pass

def cpu_isa() -> str: ...
def cpu_set_isa(name: str) -> None: ...
def cpu_available() -> list[str]: ...
def cpu_compiled() -> list[str]: ...
def num_threads() -> int: ...
def random_uniform(arg0: object | None, arg1: object | None, arg2: object | None, /) -> None: ...
def random_normal(arg0: object | None, arg1: object | None, arg2: object | None, /) -> None: ...
def random_signs(arg0: object | None, arg1: object | None, arg2: object | None, /) -> None: ...
def hadamard_parts(arg0: int | None, arg1: int | None, arg2: int | None, arg3: object | None, /) -> int: ...
def hadamard_padded(arg: int | None, /) -> int: ...
def lsh_hash(arg0: object | None, arg1: object | None, arg2: object | None, /) -> None: ...
def lsh_hash_hadamard(
    arg0: object | None, arg1: object | None, arg2: object | None, arg3: object | None, arg4: object | None, /
) -> None: ...
def bucket_sort(
    arg0: object | None, arg1: object | None, arg2: object | None, arg3: object | None, arg4: object | None, /
) -> None: ...
def bucket_attention(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: object | None,
    arg4: object | None,
    arg5: object | None,
    arg6: object | None,
    arg7: object | None,
    arg8: object | None,
    /,
) -> None: ...
def bucket_attention_bwd(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: object | None,
    arg4: object | None,
    arg5: object | None,
    arg6: object | None,
    arg7: object | None,
    arg8: object | None,
    /,
) -> None: ...
def bucket_gradient(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: object | None,
    arg4: object | None,
    arg5: object | None,
    arg6: object | None,
    arg7: object | None,
    arg8: object | None,
    arg9: object | None,
    arg10: object | None,
    arg11: object | None,
    arg12: object | None,
    arg13: object | None,
    arg14: object | None,
    /,
) -> None: ...
def collision_attention(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: object | None,
    arg4: object | None,
    arg5: object | None,
    arg6: object | None,
    arg7: object | None,
    /,
) -> None: ...
def collision_attention_bwd(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: object | None,
    arg4: object | None,
    arg5: object | None,
    arg6: object | None,
    arg7: object | None,
    arg8: object | None,
    arg9: object | None,
    arg10: object | None,
    arg11: object | None,
    /,
) -> None: ...
def l2_normalize(arg0: object | None, arg1: object | None, arg2: object | None, /) -> None: ...
def l2_normalize_bwd(arg0: object | None, arg1: object | None, arg2: object | None, arg3: object | None, /) -> None: ...
def yoso_attention(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: dict | None,
    arg4: object | None,
    arg5: object | None,
    /,
) -> None: ...
def yoso_attention_bwd(
    arg0: object | None,
    arg1: object | None,
    arg2: object | None,
    arg3: object | None,
    arg4: dict | None,
    arg5: object | None,
    arg6: object | None,
    arg7: object | None,
    arg8: object | None,
    arg9: object | None,
    /,
) -> None: ...
