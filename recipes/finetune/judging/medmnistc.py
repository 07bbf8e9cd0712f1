"""MedMNIST-C's errors relative to AlexNet's, by the figures that its package medmnistc 0.1.0 gives for AlexNet.

F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C: Comprehensive benchmark and improved classifier robustness by
simulating realistic image corruptions" (2024), arXiv:2406.17536. The balanced error BE of a corruption is the mean over
severities, divided by AlexNet's. The relative one, rBE, is its growth over the clean error, divided by the growth of
AlexNet's. Where AlexNet's error hardly grows, or falls, that is a division by next to nothing.
"""

BASELINE_SIZE = 224
SMALLEST_GROWTH = 0.02  # of AlexNet's balanced error, below which rBE says nothing

# Per data set AlexNet's balanced error on clean test images, and its mean over severities under each corruption.
ALEXNET: dict[str, tuple[float, dict[str, float]]] = {
    "bloodmnist": (
        0.0184,
        {
            "pixelate": 0.0598,
            "jpeg_compression": 0.1398,
            "defocus_blur": 0.2240,
            "motion_blur": 0.1845,
            "brightness_up": 0.0695,
            "brightness_down": 0.0790,
            "contrast_up": 0.0522,
            "contrast_down": 0.0797,
            "saturate": 0.0348,
            "stain_deposit": 0.1854,
            "bubble": 0.1290,
        },
    ),
    "breastmnist": (
        0.1454,
        {
            "pixelate": 0.4613,
            "jpeg_compression": 0.2986,
            "speckle_noise": 0.3871,
            "motion_blur": 0.2590,
            "brightness_up": 0.3198,
            "brightness_down": 0.2113,
            "contrast_down": 0.1586,
        },
    ),
    "chestmnist": (
        0.2839,
        {
            "pixelate": 0.4490,
            "jpeg_compression": 0.3458,
            "gaussian_noise": 0.4769,
            "speckle_noise": 0.4569,
            "impulse_noise": 0.4855,
            "shot_noise": 0.4927,
            "gaussian_blur": 0.3177,
            "brightness_up": 0.2994,
            "brightness_down": 0.2971,
            "contrast_up": 0.2875,
            "contrast_down": 0.2955,
            "gamma_corr_up": 0.2875,
            "gamma_corr_down": 0.2892,
        },
    ),
    "dermamnist": (
        0.3986,
        {
            "pixelate": 0.5105,
            "jpeg_compression": 0.4772,
            "gaussian_noise": 0.7702,
            "speckle_noise": 0.7689,
            "impulse_noise": 0.7996,
            "shot_noise": 0.8392,
            "defocus_blur": 0.7008,
            "motion_blur": 0.6266,
            "zoom_blur": 0.5278,
            "brightness_up": 0.4474,
            "brightness_down": 0.5773,
            "contrast_up": 0.4304,
            "contrast_down": 0.5398,
            "black_corner": 0.7591,
            "characters": 0.4462,
        },
    ),
    "octmnist": (
        0.2020,
        {
            "pixelate": 0.3124,
            "jpeg_compression": 0.2964,
            "speckle_noise": 0.3860,
            "defocus_blur": 0.3084,
            "motion_blur": 0.4892,
            "contrast_down": 0.4196,
        },
    ),
    "organamnist": (
        0.0501,
        {
            "pixelate": 0.0759,
            "jpeg_compression": 0.1023,
            "gaussian_noise": 0.5589,
            "speckle_noise": 0.5009,
            "impulse_noise": 0.6005,
            "shot_noise": 0.5705,
            "gaussian_blur": 0.2334,
            "brightness_up": 0.1476,
            "brightness_down": 0.2646,
            "contrast_up": 0.1098,
            "contrast_down": 0.1268,
            "gamma_corr_up": 0.1036,
            "gamma_corr_down": 0.1058,
        },
    ),
    "organcmnist": (
        0.0760,
        {
            "pixelate": 0.1216,
            "jpeg_compression": 0.1075,
            "gaussian_noise": 0.5737,
            "speckle_noise": 0.5131,
            "impulse_noise": 0.5998,
            "shot_noise": 0.5492,
            "gaussian_blur": 0.3169,
            "brightness_up": 0.1601,
            "brightness_down": 0.2324,
            "contrast_up": 0.0999,
            "contrast_down": 0.1533,
            "gamma_corr_up": 0.1426,
            "gamma_corr_down": 0.1239,
        },
    ),
    "organsmnist": (
        0.2430,
        {
            "pixelate": 0.3126,
            "jpeg_compression": 0.2700,
            "gaussian_noise": 0.5889,
            "speckle_noise": 0.5450,
            "impulse_noise": 0.6010,
            "shot_noise": 0.5519,
            "gaussian_blur": 0.4467,
            "brightness_up": 0.3599,
            "brightness_down": 0.3593,
            "contrast_up": 0.2872,
            "contrast_down": 0.3128,
            "gamma_corr_up": 0.3025,
            "gamma_corr_down": 0.3116,
        },
    ),
    "pathmnist": (
        0.0884,
        {
            "pixelate": 0.2093,
            "jpeg_compression": 0.2471,
            "defocus_blur": 0.4621,
            "motion_blur": 0.3689,
            "brightness_up": 0.4155,
            "brightness_down": 0.2812,
            "contrast_up": 0.2339,
            "contrast_down": 0.1372,
            "saturate": 0.3341,
            "stain_deposit": 0.2493,
            "bubble": 0.1082,
        },
    ),
    "pneumoniamnist": (
        0.1009,
        {
            "pixelate": 0.2210,
            "jpeg_compression": 0.2798,
            "gaussian_noise": 0.4415,
            "speckle_noise": 0.3457,
            "impulse_noise": 0.4581,
            "shot_noise": 0.4107,
            "gaussian_blur": 0.2731,
            "brightness_up": 0.1465,
            "brightness_down": 0.2782,
            "contrast_up": 0.0953,
            "contrast_down": 0.2374,
            "gamma_corr_up": 0.0961,
            "gamma_corr_down": 0.1664,
        },
    ),
    "retinamnist": (
        0.5582,
        {
            "pixelate": 0.6017,
            "jpeg_compression": 0.6795,
            "gaussian_noise": 0.7041,
            "speckle_noise": 0.6135,
            "defocus_blur": 0.6883,
            "motion_blur": 0.7076,
            "brightness_down": 0.5845,
            "contrast_down": 0.6093,
        },
    ),
    "tissuemnist": (
        0.3918,
        {
            "pixelate": 0.4927,
            "jpeg_compression": 0.5081,
            "impulse_noise": 0.7971,
            "gaussian_blur": 0.4805,
            "brightness_up": 0.4618,
            "brightness_down": 0.5198,
            "contrast_up": 0.5026,
            "contrast_down": 0.5369,
        },
    ),
}


def relative_errors(suite: str, clean: float, corrupted: dict[str, float]) -> dict[str, tuple[float, float]]:
    """BE and rBE of each corruption that AlexNet was scored on; none for another suite.

    Args:
        clean: balanced error on clean images.
        corrupted: the same under each corruption, mean over severities.
    """
    if suite not in ALEXNET:
        return {}
    clean_base, bases = ALEXNET[suite]
    return {
        name: (error / bases[name], (error - clean) / (bases[name] - clean_base))
        for name, error in corrupted.items()
        if name in bases
    }


def ill_conditioned(suite: str) -> list[str]:
    """The corruptions whose rBE says nothing."""
    clean, bases = ALEXNET.get(suite, (0.0, {}))
    return [name for name, error in bases.items() if error - clean < SMALLEST_GROWTH]
