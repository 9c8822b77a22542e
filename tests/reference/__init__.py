"""The methods as their papers write them: dense, one process, independent of the package they judge."""

from tests.reference.adarankgrad import DenseAdaRankGrad
from tests.reference.apollo import DenseApollo
from tests.reference.galore import DenseGaLore
from tests.reference.gradnormlorp import DenseGradNormLoRP
from tests.reference.lorenza import DenseLorenza
from tests.reference.online_subspace_descent import DenseOnlineSubspaceDescent
from tests.reference.vlorp import DenseVLoRP

DENSE = {
    "GaLore": DenseGaLore,
    "OnlineSubspaceDescent": DenseOnlineSubspaceDescent,
    "VLoRP": DenseVLoRP,
    "AdaRankGrad": DenseAdaRankGrad,
    "Apollo": DenseApollo,
    "GradNormLoRP": DenseGradNormLoRP,
    "Lorenza": DenseLorenza,
}
