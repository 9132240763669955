from tlauto_example import BiasOnly

from tlauto.testing import FreezeStrategySuite


class TestBiasOnly(FreezeStrategySuite):
    strategy = BiasOnly()
