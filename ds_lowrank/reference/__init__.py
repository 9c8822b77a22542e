"""The methods as their papers write them: dense, one process, independent of the package they judge."""

from ds_lowrank.reference.adarankgrad import DenseAdaRankGrad
from ds_lowrank.reference.apollo import DenseApollo
from ds_lowrank.reference.galore import DenseGaLore
from ds_lowrank.reference.gradnormlorp import DenseGradNormLoRP
from ds_lowrank.reference.lorenza import DenseLorenza
from ds_lowrank.reference.online_subspace_descent import DenseOnlineSubspaceDescent
from ds_lowrank.reference.vlorp import DenseVLoRP

DENSE = {
    "GaLore": DenseGaLore,
    "OnlineSubspaceDescent": DenseOnlineSubspaceDescent,
    "VLoRP": DenseVLoRP,
    "AdaRankGrad": DenseAdaRankGrad,
    "Apollo": DenseApollo,
    "GradNormLoRP": DenseGradNormLoRP,
    "Lorenza": DenseLorenza,
}
