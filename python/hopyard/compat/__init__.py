# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for the fused MoE functions of other libraries."""
