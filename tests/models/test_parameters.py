import pytest

from vitrail.models import MODELS, model_config, parameters_of

# Sources. [vj] google-research/vision_transformer, models_test.py. [deit] DeiT's repository.
# [timm] timm 1.0.31, its model of that name on the meta device. [class] timm's VisionTransformer
# with the row's sizes: nobody publishes the count. [timm + d] as [timm], and one row of `width`:
# timm adds the class token's position to the token; Facebook's and Hugging Face's files keep it,
# and have our count. [timm + k] as [timm], with the keys' bias, which is zero and no parameter
# there. [timm - r] as [timm], without the registers' positions. [timm - b] without the head's bias.
# [sum] ours alone, by hand: stem + positions + 6 blocks + norm + head.
# [hf - d] transformers' VitDetBackbone, without the class token's position, which nothing reads.
# [formula] by the formula of the Mixers that are published. [logs] the authors' logs. [tv]
# torchvision's models of that name.
COUNTS = {
    "vit_mu16": 76_712,  # [class]
    "vit_ti16": 5_717_416,  # [vj]
    "vit_s32": 22_878_952,  # [vj]
    "vit_s16": 22_050_664,  # [vj]
    "vit_s14": 22_004_584,  # [class]
    "vit_s8": 22_055_272,  # [timm]
    "vit_m16": 38_837_736,  # [class]
    "vit_b32": 88_224_232,  # [vj]
    "vit_b16": 86_567_656,  # [vj]
    "vit_b14": 86_475_496,  # [class]
    "vit_b8": 86_576_872,  # [vj]
    "vit_l32": 306_535_400,  # [vj]
    "vit_l16": 304_326_632,  # [vj]
    "vit_l14": 304_203_752,  # [timm]
    "vit_h14": 632_045_800,  # [vj]
    "r_ti16": 6_337_704,  # [vj]
    "r26_s32": 36_431_912,  # [vj]
    "r50_b16": 98_659_112,  # [vj]
    "r50_l32": 328_994_856,  # [vj]
    "vit_g14": 1_012_611_432,  # [timm] vit_giant_patch14_224
    "vit_bigg14": 1_844_440_680,  # [timm] vit_gigantic_patch14_224
    "vit_e14": 3_875_135_720,  # [class]
    "vit_so400m14": 428_833_704,  # [timm] vit_so400m_patch14_siglip_224 with 1000 classes
    "deit_ti16": 5_717_416,  # [deit]
    "deit_s16": 22_050_664,  # [deit]
    "deit_b16": 86_567_656,  # [deit]
    "deit_ti16_distilled": 5_910_800,  # [deit]
    "deit_s16_distilled": 22_436_432,  # [deit]
    "deit_b16_distilled": 87_338_192,  # [deit]
    "deit3_s16": 22_059_496,  # [timm]
    "deit3_m16": 38_849_512,  # [timm]
    "deit3_b16": 86_585_320,  # [timm]
    "deit3_l16": 304_374_760,  # [timm]
    "deit3_h14": 632_126_440,  # [timm]
    "dinov2_s14": 22_056_192,  # [timm] vit_small_patch14_dinov2, without a head, at 518 pixels
    "dinov2_b14": 86_579_712,  # [timm]
    "dinov2_l14": 304_367_616,  # [timm]
    "dinov2_g14": 1_136_479_232,  # [timm]
    "dinov2_s14_reg": 22_057_728,  # [timm + d] 22_057_344 + 384
    "dinov2_b14_reg": 86_582_784,  # [timm + d] 86_582_016 + 768
    "dinov2_l14_reg": 304_371_712,  # [timm + d] 304_370_688 + 1024
    "dinov2_g14_reg": 1_136_485_376,  # [timm + d] 1_136_483_840 + 1536
    "tipsv2_b14": 86_315_520,  # [timm + d] 86_314_752 + 768
    "tipsv2_l14": 304_015_360,  # [timm + d] 304_014_336 + 1024
    "tipsv2_so400m14": 413_392_752,  # [timm + d] 413_391_600 + 1152
    "tipsv2_g14": 1_135_950_848,  # [timm + d] 1_135_949_312 + 1536
    "dinov3_ti16": 5_491_968,  # [timm + k] 5_489_664 + 12 * 192, vit_tiny_patch16_dinov3_qkvb
    "dinov3_s16": 21_600_768,  # [timm + k] 21_596_160 + 12 * 384
    "dinov3_s16plus": 28_697_088,  # [timm + k] 28_692_480 + 12 * 384
    "dinov3_b16": 85_668_864,  # [timm + k] 85_659_648 + 12 * 768
    "dinov3_l16": 303_153_152,  # [timm + k] 303_128_576 + 24 * 1024
    "dinov3_h16plus": 840_632_320,  # [timm + k] 840_591_360 + 32 * 1280
    "dinov3_g16": 1_134_657_536,  # [timm + k] 1_134_473_216 + 40 * 3 * 1536, without q and v
    "dinov3_7b16": 6_716_030_976,  # [timm] vit_7b_patch16_dinov3
    "clip_b32": 87_849_216,  # [hf] 87_456_000 + 768 * 512
    "clip_b16": 86_192_640,  # [oc]
    "clip_l14": 303_966_208,  # [oc]
    "siglip_b16": 92_884_224,  # [timm] vit_base_patch16_siglip_224
    "siglip_l16": 315_956_224,  # [timm] vit_large_patch16_siglip_256
    "siglip_b32": 94_552_320,  # [timm] vit_base_patch32_siglip_256
    "siglip_so400m14": 427_680_704,  # [timm]
    "siglip_so400m16": 427_888_064,  # [timm] vit_so400m_patch16_siglip_256
    "siglip_g16": 1_163_168_256,  # [timm] vit_giantopt_patch16_siglip_256
    "vit_wee16": 13_422_568,  # [timm] vit_wee_patch16_reg1_gap_256
    "vit_little16": 22_516_008,  # [timm] vit_little_patch16_reg4_gap_256
    "vit_medium16": 38_881_768,  # [timm] vit_medium_patch16_reg4_gap_256
    "vit_mediumd16": 64_109_032,  # [timm] vit_mediumd_patch16_reg4_gap_256
    "vit_betwixt16": 60_398_440,  # [timm] vit_betwixt_patch16_reg4_gap_256
    "vit_so150m16": 134_127_976,  # [timm - r] 134_131_560 - 4 * 896
    "vit_so150m2_16": 136_058_728,  # [timm - r] 136_059_560 - 832
    "clip_xsmall16": 8_276_992,  # [timm - b] 8_277_504 - 512
    "clip_medium16": 38_587_392,  # [timm - b] 38_587_904 - 512
    "clip_medium32": 39_691_776,  # [timm - b] 39_692_288 - 512
    "clip_betwixt32": 61_411_200,  # [timm - b] 61_411_712 - 512
    "pe_core_ti16": 6_141_056,  # [timm] vit_pe_core_tiny_patch16_384 and so on
    "pe_core_s16": 23_783_168,  # [timm]
    "pe_core_b16": 93_673_984,  # [timm]
    "pe_core_l14": 317_152_256,  # [timm]
    "pe_core_g14": 1_882_033_920,  # [timm]
    "pe_spatial_ti16": 5_683_200,  # [timm]
    "pe_spatial_s16": 21_983_232,  # [timm]
    "pe_spatial_b16": 86_433_792,  # [timm]
    "pe_spatial_l14": 303_964_160,  # [timm]
    "pe_spatial_g14": 1_851_887_104,  # [timm]
    "pe_lang_l14": 291_415_040,  # [timm]
    "pe_lang_g14": 1_740_922_624,  # [timm]
    "eva_g14": 1_012_611_432,  # [timm + k] 1_012_555_112 + 40 * 1408
    "eva_g14_clip": 1_012_645_248,  # [timm + k] 1_012_588_928 + 40 * 1408
    "eva02_ti14": 5_697_448,  # [timm + k] 5_695_144 + 12 * 192, with 1000 classes at 224
    "eva02_s14": 22_010_728,  # [timm + k] 22_006_120 + 12 * 384
    "eva02_b14": 86_536_936,  # [timm + k] 86_527_720 + 12 * 768
    "eva02_l14": 304_318_376,  # [timm + k] 304_293_800 + 24 * 1024
    "eva02_b16_clip": 86_272_256,  # [timm + k] 86_263_040 + 12 * 768
    "eva02_l14_clip": 304_129_728,  # [timm + k] 304_105_152 + 24 * 1024
    "vit_s16_rope": 21_984_232,  # [timm] vit_small_patch16_rope_224 and so on
    "vit_b16_rope": 86_434_792,  # [timm]
    "vit_l16_rope": 304_174_056,  # [timm]
    "vit_s16_rope_ape": 22_059_496,  # [timm]
    "vit_b16_rope_ape": 86_585_320,  # [timm]
    "vit_l16_rope_ape": 304_374_760,  # [timm]
    "vit_m16_rope_reg1_gap": 38_749_160,  # [timm + k] 38_743_016 + 12 * 512
    "vit_mediumd16_rope_reg1_gap": 63_945_704,  # [timm] it has no biases there at all
    "vit_betwixt16_rope_reg4_gap": 60_234_600,  # [timm + k] 60_226_920 + 12 * 640
    "vit_b16_rope_reg1_gap": 86_434_792,  # [timm + k] 86_425_576 + 12 * 768
    "vitdet_b": 85_888_256,  # [hf - d] 85_889_024 at 1024 pixels
    "vitdet_l": 303_431_680,  # [hf - d]
    "vit_mini16": 3_125_632,  # [sum] 256_152 + 6_912 + 6 * 444_864 + 384 + 193_000
    "vit_nano8": 1_430_920,  # [sum] 109_984 + 2_048 + 6 * 198_272 + 256 + 129_000
    "vit_pico8": 1_341_784,  # [sum] 246_384 + 12_288 + 2 * 444_864 + 384 + 193_000
    "dynamicvit_ti16": 5_899_582,  # [sum] deit_ti16 and three predictors of 60_722
    "dynamicvit_s16": 22_774_414,  # [sum] deit_s16 and three of 241_250
    "dynamicvit_b16": 89_452_846,  # [sum] deit_b16 and three of 961_730
    "mixer_s32": 19_104_624,  # [timm]
    "mixer_s16": 18_528_264,  # [timm]
    "mixer_b32": 60_293_428,  # [vj]
    "mixer_b16": 59_880_472,  # [vj]
    "mixer_l32": 206_939_264,  # [timm]
    "mixer_l16": 208_196_168,  # [vj]
    "mixer_h14": 432_350_952,  # [formula]
    "gmlp_ti16": 5_867_328,  # [timm]
    "gmlp_s16": 19_422_656,  # [timm]
    "gmlp_b16": 73_075_392,  # [timm]
    "twins_svt_s": 24_060_776,  # [logs]
    "twins_svt_b": 56_070_952,  # [logs]
    "twins_svt_l": 99_271_400,  # [logs]
    "twins_pcpvt_s": 24_106_216,  # [logs]
    "twins_pcpvt_b": 43_828_456,  # [logs]
    "twins_pcpvt_l": 60_989_672,  # [logs]
    "mobilevit_xxs": 1_272_024,  # [timm] 1.27, 2.32 and 5.58 million in the paper
    "mobilevit_xs": 2_317_848,  # [timm]
    "mobilevit_s": 5_578_632,  # [timm]
    "bit_r50x1": 25_549_352,  # [timm] resnetv2_50x1_bit
    "bit_r101x1": 44_541_480,  # [timm]
    "bit_r152x2": 236_335_208,  # [timm]
    "resnet18": 11_689_512,  # [tv]
    "resnet50": 25_557_032,  # [tv]
}
AT_384 = {  # [vj]: the position table grows
    "vit_ti16": 5_790_376,
    "vit_s32": 22_915_432,
    "vit_s16": 22_196_584,
    "vit_b32": 88_297_192,
    "vit_b16": 86_859_496,
    "vit_l32": 306_632_680,
    "vit_l16": 304_715_752,
}
POOLED_BY_MEAN = {  # [vj]: the *-gap-norep variants, no class token and no row for it
    "vit_s32": 22_878_184,
    "vit_s16": 22_049_896,
    "vit_b32": 88_222_696,
    "vit_b16": 86_566_120,
}


def count(name: str, **changes: object) -> int:
    return parameters_of(model_config(name, **changes))


def test_every_model_is_in_the_table():
    assert list(MODELS) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_as_published(name):
    assert count(name) == COUNTS[name]


@pytest.mark.parametrize("name", AT_384)
def test_as_published_at_384_pixels(name):
    assert count(name, image_size=(384, 384)) == AT_384[name]


@pytest.mark.parametrize("name", POOLED_BY_MEAN)
def test_as_published_with_mean_pooling(name):
    assert count(name, pool="mean", class_token=False) == POOLED_BY_MEAN[name]
