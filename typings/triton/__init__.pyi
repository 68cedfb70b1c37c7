# What Triton compiles is typed as if Python ran it: `constexpr` where a number goes in, loops over "NoReturn".
# For the type checker everything of it is Any; the code around the kernels is checked.
from typing import Any

def __getattr__(name: str) -> Any: ...
