"""The built-in PyTorch providers pass the suite that third parties subclass."""

from __future__ import annotations

from tlauto.builtin.timm_provider import TimmProvider
from tlauto.builtin.torchvision_provider import TorchvisionProvider
from tlauto.testing import BackboneProviderSuite


class TestTimmConvolutions(BackboneProviderSuite):
    provider = TimmProvider()
    example = "timm:test_resnet.r160_in1k"


class TestTimmMobileNet(BackboneProviderSuite):
    provider = TimmProvider()
    # Its last convolution stands behind the pooling, so the two kinds of features differ.
    example = "timm:mobilenetv3_small_050.lamb_in1k"


class TestTimmTransformer(BackboneProviderSuite):
    provider = TimmProvider()
    example = "timm:test_vit.r160_in1k"


class TestTorchvisionConvolutions(BackboneProviderSuite):
    provider = TorchvisionProvider()
    example = "torchvision:shufflenet_v2_x0_5.IMAGENET1K_V1"
    weights_suffix = ".pth"
