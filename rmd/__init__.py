"""The method: noise schedules, cascades, the upsampling transformation, the sampler and the backbones.

Nothing in this package serves, trains or compiles; the packages that do build on it.
"""
