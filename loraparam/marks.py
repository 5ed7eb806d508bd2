"""The names under which modules carry what is noted on them."""

RECORD = "_loraparam"  # on a host: what it needs to become itself again
FROZEN = "_loraparam_frozen"  # on any module: (name, its originals' flags) of its parameters that ``attach`` froze
ALIAS = "_loraparam_alias"  # on a parametrization list: whether its tensor was attached to at another place
GUARDED = "_loraparam_guarded"  # on the guarded classes themselves, not on what is derived from them
