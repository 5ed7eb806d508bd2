"""The operations that run on the parts of an effective weight, one family a file.

Each is registered for the torch functions it stands for, and returns NotImplemented where it needs the whole
weight. What they compute is linear in the weight: the base's own operation, and a thin one beside it.
"""

from . import attention as attention
from . import contractions as contractions
from . import convolutions as convolutions
from . import lookups as lookups
from . import products as products
from . import views as views
