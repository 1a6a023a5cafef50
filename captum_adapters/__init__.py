"""Adapters for Captum.

The package is reserved for attribution classes and metrics in Captum's manner,
which are built on :py:mod:`zennit_resnet`. There are none in this version.
"""
