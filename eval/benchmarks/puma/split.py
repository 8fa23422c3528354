"""MUSE's division of PUMA's ROIs: names out of data/PUMA/{val,test}.json of its repository.

42 ROIs to choose on and 42 to test on, half of them of primary and half of metastatic melanoma; all
others train.
"""

_NUMBERS = {
    "val": {
        "metastatic": (
            33,
            37,
            42,
            47,
            49,
            51,
            55,
            57,
            58,
            59,
            60,
            62,
            70,
            71,
            76,
            82,
            89,
            90,
            96,
            97,
            100,
        ),
        "primary": (1, 3, 4, 9, 13, 14, 15, 27, 29, 32, 36, 42, 43, 47, 51, 52, 63, 74, 78, 88, 98),
    },
    "test": {
        "metastatic": (
            2,
            3,
            15,
            21,
            22,
            24,
            30,
            38,
            52,
            53,
            61,
            64,
            72,
            75,
            83,
            87,
            88,
            93,
            94,
            95,
            103,
        ),
        "primary": (
            5,
            7,
            8,
            12,
            23,
            28,
            33,
            34,
            35,
            37,
            41,
            44,
            48,
            62,
            65,
            72,
            73,
            81,
            99,
            100,
            101,
        ),
    },
}
# ROI name -> 'val' or 'test'.
SPLIT_OF = {
    f"training_set_{tissue}_roi_{number:03d}": split
    for split, tissues in _NUMBERS.items()
    for tissue, numbers in tissues.items()
    for number in numbers
}
