"""The list of architectures: ``ZOO[name] = (factory, shape of one example)``. timm's, and some written out here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Entry = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _timm(name: str, size: int) -> Entry:
    def build() -> nn.Module:
        _define_torchvision_ops()
        import timm

        return timm.create_model(name, pretrained=False)

    return build, (2, 3, size, size)


def preload() -> None:
    """Import what the models need, once for all processes."""
    _define_torchvision_ops()
    try:
        import timm  # noqa: F401
        import torch_pruning  # noqa: F401
    except ImportError:
        pass


_LIBRARIES = []


def _define_torchvision_ops() -> None:
    """Torchvision refuses to be imported beside a torch built for another device unless its ops have schemas."""
    if not _LIBRARIES:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


def _names(text: str) -> list[str]:
    return text.split()


_CNN = _names("""
resnet18 resnet34 resnet50 resnet50d resnet26t resnet101 wide_resnet50_2 resnext50_32x4d seresnet50
seresnext50_32x4d ecaresnet26t resnet50_gn resnetblur50 skresnet18 skresnext50_32x4d resnest14d resnest26d
resnest50d res2net50_26w_4s res2net50_14w_8s res2next50 cspresnet50 cspresnext50 cspdarknet53 darknet53 darknetaa53
cs3darknet_m cs3sedarknet_l densenet121 densenetblur121d dpn48b dpn68 dla34 dla60 dla60_res2net dla60x_c
dla60_res2next hrnet_w18_small hrnet_w18_small_v2 vovnet39a ese_vovnet19b_dw ese_vovnet39b vgg11_bn vgg16 repvgg_a2
repvgg_b0 mobileone_s1 regnetx_008 regnety_008 regnetz_b16 regnetv_040 mobilenetv1_100 mobilenetv2_100
mobilenetv3_large_100 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium mnasnet_100
semnasnet_100 spnasnet_100 fbnetc_100 fbnetv3_b efficientnet_b0 efficientnet_b2 efficientnet_lite0 efficientnet_es
tf_efficientnetv2_b0 efficientnetv2_rw_t mixnet_s tinynet_e lcnet_100 hardcorenas_a ghostnet_100 ghostnetv2_100
ghostnetv3_100 rexnet_100 selecsls42b inception_v3 inception_v4 inception_resnet_v2 xception41 legacy_xception
nasnetalarge pnasnet5large tresnet_m hgnet_tiny hgnetv2_b0 gernet_m convmixer_768_32 resnetv2_50 resnetv2_50d_evos
nfnet_l0 dm_nfnet_f0 nf_resnet50 convnext_tiny convnextv2_atto convnext_atto inception_next_tiny edgenext_xx_small
fasternet_t0 repghostnet_100 starnet_s1 repvit_m1 shvit_s1 lambda_resnet26t halonet26t botnet26t_256 bat_resnext26ts
gcresnet33ts
""")
_HYBRID = _names("""
vit_tiny_patch16_224 deit_tiny_patch16_224 cait_xxs24_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
pvt_v2_b0 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 efficientformer_l1 efficientformerv2_s0
mobilevit_xxs mobilevitv2_050 mixer_s16_224 resmlp_12_224 gmlp_ti16_224 coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256
levit_128 twins_pcpvt_small xcit_nano_12_p16_224 crossvit_tiny_240 pit_ti_224 visformer_tiny fastvit_t8 nest_tiny
convit_tiny davit_tiny focalnet_tiny_srf mvitv2_tiny tiny_vit_5m_224 beit_base_patch16_224 eva02_tiny_patch14_224
""")
_SIZES = {
    **dict.fromkeys(_names("nasnetalarge pnasnet5large inception_v3 inception_v4 inception_resnet_v2"), 128),
    **dict.fromkeys(_names("halonet26t botnet26t_256 lambda_resnet26t bat_resnext26ts"), 256),
    **dict.fromkeys(_names("swinv2_tiny_window8_256 maxvit_rmlp_pico_rw_256"), 256),
    "crossvit_tiny_240": 240,
}
ZOO: dict[str, Entry] = {n: _timm(n, _SIZES.get(n, 96)) for n in _CNN}
ZOO |= {n: _timm(n, _SIZES.get(n, 224)) for n in _HYBRID}


def _own() -> dict[str, Entry]:
    import zoo_own

    return {name: (factory, shape) for name, (factory, shape) in zoo_own.OWN.items()}


ZOO |= _own()
QUICK = _names("""
resnet18 res2net50_26w_4s densenet121 mobilenetv3_small_100 ghostnet_100 rexnet_100 dpn48b regnety_008 convnext_atto
vit_tiny_patch16_224 poolformer_s12 unet yolo
""")

#: not in the list; by name, for the memory that tracing takes at a usual size
EXTRA = ("resnet50_224",)
ZOO["resnet50_224"] = _timm("resnet50", 224)
