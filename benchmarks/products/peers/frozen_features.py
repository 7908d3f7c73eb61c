"""scikit-learn on frozen features: logistic regression or nearest neighbors, tuned by 5-fold cross-validation.

Both train on train and val, because cross-validation replaces the validation split. The time budget is ignored.
"""

import time
import warnings
from pathlib import Path

import common
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform


def fit(job: common.Job) -> common.Fitted:
    """Compute the features once and tune C or the number of neighbors."""
    mean, std = job.statistics()
    transform = create_transform((3, job.pixels, job.pixels), mean=mean, std=std, crop_pct=1.0)
    model = job.backbone()

    def features(paths: list[Path]) -> np.ndarray:
        return common.outputs(model, paths, transform).numpy()

    pairs = job.parts["train"] + job.parts["val"]
    inputs, labels = features([path for path, _ in pairs]), np.array([label for _, label in pairs])
    features_s = time.perf_counter() - job.start
    if job.variant == "logistic":
        estimator = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        choices = {"logisticregression__C": np.logspace(-4, 2, 7).tolist()}
    else:
        estimator = KNeighborsClassifier(metric="cosine", weights="distance")
        choices = {"n_neighbors": [1, 3, 5, 10, 20]}
    search = GridSearchCV(estimator, choices, cv=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        warnings.filterwarnings("ignore", message="The least populated class")
        search.fit(inputs, labels)
    stored = inputs.nbytes if job.variant == "knn" else (inputs.shape[1] + 1) * len(job.classes) * 4
    details = {**search.best_params_, "features_s": round(features_s, 2), "learns_from": "train and val"}
    return common.Fitted(lambda paths: search.predict_proba(features(paths)), stored, details)


if __name__ == "__main__":
    common.main("sklearn", fit, ("scikit-learn",), ("logistic", "knn"))
