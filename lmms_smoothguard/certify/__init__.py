"""Certificates for smoothed features, classes and answers: numpy and scipy, no torch.

    certificate = certify_feature(inner, sigma=0.25, alpha=0.001)  # <u, g(x + e_i)>: (n,) or (n, tokens)
    certificate.at(0.1)        # FCSB(0.1), or None: ABSTAIN
    certificate.radius(0.5)    # R(0.5), or None: ABSTAIN

What each of them promises and does not: `docs/certificates.md`. Bad values raise ConfigError.
"""

from lmms_smoothguard.certify.answers import (
    AnswerCertificate,
    CertifiedAccuracy,
    certified_accuracy,
    certify_answer,
    certify_votes,
    largest_answer_radius,
    select_answer,
)
from lmms_smoothguard.certify.betting import betting_lower
from lmms_smoothguard.certify.bounds import (
    DEFAULT_METHODS,
    METHODS,
    MeanBound,
    bernstein_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    hoeffding_lower,
    kl_deviation,
    kl_lower,
    lower_mean,
    lower_means,
    upper_mean,
    upper_means,
)
from lmms_smoothguard.certify.checks import unit_rows
from lmms_smoothguard.certify.classes import ClassCertificate, certify_class, largest_class_radius
from lmms_smoothguard.certify.features import (
    FeatureCertificate,
    TokenCertificate,
    certify_feature,
    certify_tokens,
    largest_feature_radius,
    largest_score,
)
from lmms_smoothguard.certify.gaussian import ABSTAIN, CERTIFIED, ServedBound, fcsb, radius, served_bound
from lmms_smoothguard.certify.images import Encoder, ImageCertificates, certify_image, certify_image_class

__all__ = [
    "ABSTAIN",
    "CERTIFIED",
    "DEFAULT_METHODS",
    "METHODS",
    "AnswerCertificate",
    "CertifiedAccuracy",
    "ClassCertificate",
    "Encoder",
    "FeatureCertificate",
    "ImageCertificates",
    "MeanBound",
    "ServedBound",
    "TokenCertificate",
    "bernstein_lower",
    "betting_lower",
    "certified_accuracy",
    "certify_answer",
    "certify_class",
    "certify_feature",
    "certify_image",
    "certify_image_class",
    "certify_tokens",
    "certify_votes",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "fcsb",
    "hoeffding_lower",
    "kl_deviation",
    "kl_lower",
    "largest_answer_radius",
    "largest_class_radius",
    "largest_feature_radius",
    "largest_score",
    "lower_mean",
    "lower_means",
    "radius",
    "select_answer",
    "served_bound",
    "unit_rows",
    "upper_mean",
    "upper_means",
]
