"""Facts about the Human Protein Atlas (HPA) 2018 image set: channels, labels, label counts, intensity statistics.

Label names and numbers are those of the Kaggle competition *Human Protein Atlas Image Classification* (2018); the
counts are those of its `train.csv` (31,072 ids). The competition of 2021, on single cells, numbers its labels
otherwise: they are `HPA_LABELS_2021`. Nothing here but numbers and names.

>>> dict(zip(HPA_LABELS, HPA_COUNTS, strict=True))["Rods & rings"], HPA_N_IDS
(11, 31072)
>>> HPA_LABELS[9], HPA_LABELS_2021[9]
('Endosomes', 'Actin filaments')
>>> [f"{c}: {mean:.2f}, {std:.2f}" for c, mean, std in zip(HPA_CHANNELS, HPA_MEAN, HPA_STD, strict=True)]
['red: 0.08, 0.14', 'green: 0.05, 0.10', 'blue: 0.05, 0.15', 'yellow: 0.08, 0.14']
"""

# Stain of each channel: red = microtubules, green = the protein of interest, blue = nucleus, yellow = ER.
HPA_CHANNELS: tuple[str, ...] = ("red", "green", "blue", "yellow")

HPA_LABELS: tuple[str, ...] = (
    "Nucleoplasm",
    "Nuclear membrane",
    "Nucleoli",
    "Nucleoli fibrillar center",
    "Nuclear speckles",
    "Nuclear bodies",
    "Endoplasmic reticulum",
    "Golgi apparatus",
    "Peroxisomes",
    "Endosomes",
    "Lysosomes",
    "Intermediate filaments",
    "Actin filaments",
    "Focal adhesion sites",
    "Microtubules",
    "Microtubule ends",
    "Cytokinetic bridge",
    "Mitotic spindle",
    "Microtubule organizing center",
    "Centrosome",
    "Lipid droplets",
    "Plasma membrane",
    "Cell junctions",
    "Mitochondria",
    "Aggresome",
    "Cytosol",
    "Cytoplasmic bodies",
    "Rods & rings",
)

# Those of *Human Protein Atlas - Single Cell Classification* (Kaggle, 2021), by number.
HPA_LABELS_2021: tuple[str, ...] = (
    *HPA_LABELS[:8],
    "Intermediate filaments",
    "Actin filaments",
    "Microtubules",
    "Mitotic spindle",
    "Centrosome",
    "Plasma membrane",
    "Mitochondria",
    "Aggresome",
    "Cytosol",
    "Vesicles and punctate cytosolic patterns",
    "Negative",
)

# Labels and their names, by what `vocab=` and `label_names=` call them.
LABEL_SETS: dict[str, dict[str, str]] = {
    "hpa": {str(i): name for i, name in enumerate(HPA_LABELS)},
    "hpa2021": {str(i): name for i, name in enumerate(HPA_LABELS_2021)},
}

# Ids carrying each label, by label number.
HPA_COUNTS: tuple[int, ...] = (
    12885, 1254, 3621, 1561, 1858, 2513, 1008, 2822, 53, 45, 28, 1093, 688, 537,
    1066, 21, 530, 210, 902, 1482, 172, 3777, 802, 2965, 322, 8228, 328, 11,
)  # fmt: skip

HPA_N_IDS: int = 31072

# Mean and standard deviation of the training images per channel, in the order of HPA_CHANNELS, intensities in 0..1.
# The figures of the competition's public kernels, which most solutions took over (among many the repository
# wdhorton/protein-atlas-fastai). The deviation is a little below that of all pixels pooled (about .150 .112 .156 .150).
HPA_MEAN: tuple[float, ...] = (0.08069, 0.05258, 0.05487, 0.08282)
HPA_STD: tuple[float, ...] = (0.13704, 0.10145, 0.15313, 0.13814)
