"""``import tilemla.preload``: find, or generate, and open the modules of a model before the first request comes.

The preset is that of ``TILEMLA_PRELOAD``, by default ``deepseek-v3``. ``tilemla.preload_modules`` does it by call.
"""

from tilemla import env
from tilemla.preloading import preload_modules

preload_modules(env.preload_preset() or "deepseek-v3")
