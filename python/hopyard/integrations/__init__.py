# SPDX-License-Identifier: Apache-2.0
"""Hopyard inside of other libraries; each module imports the library that it is named after."""
