"""Roles: what each parameter is, decided by its path, never by its number of axes alone.

Under scanned layers a norm's scale is 2-D and a matrix 3-D, and an embedding is 2-D like any matrix; so
ordered rules over the path say what a parameter is, and which of its axes are rows and columns. The
first rule that matches decides, and every parameter must be matched.
"""

from ...core.paths import path_string
from .assignment import (
    assign_roles,
    axes_from_names,
    axes_of_path,
    known_roles,
    layouts,
    mask_by_role,
)
from .deciding import Decided, check_roles, complete, decide
from .rules import (
    ATTENTION_IN,
    ATTENTION_OUT,
    COMMON_RULES,
    CONVOLUTION,
    EQUINOX_RULES,
    HAIKU_RULES,
    HUGGING_FACE_RULES,
    IN_OUT,
    LINEN_RULES,
    MATRIX_ROLES,
    MAXTEXT_RULES,
    NNX_RULES,
    OUT_IN,
    RAVINE_RULES,
    Role,
    Rule,
    Rules,
)
from .table import matrices, role_table

__all__ = [
    "ATTENTION_IN",
    "ATTENTION_OUT",
    "COMMON_RULES",
    "CONVOLUTION",
    "EQUINOX_RULES",
    "HAIKU_RULES",
    "HUGGING_FACE_RULES",
    "IN_OUT",
    "LINEN_RULES",
    "MATRIX_ROLES",
    "MAXTEXT_RULES",
    "NNX_RULES",
    "OUT_IN",
    "RAVINE_RULES",
    "Decided",
    "Role",
    "Rule",
    "Rules",
    "assign_roles",
    "axes_from_names",
    "axes_of_path",
    "check_roles",
    "complete",
    "decide",
    "known_roles",
    "layouts",
    "mask_by_role",
    "matrices",
    "path_string",
    "role_table",
]
