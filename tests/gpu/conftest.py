"""Every test here runs on the GPU, where there is one, and by its logic on the CPU in the stress tests."""

import pytest
import torch

NO_GPU = "this machine has no GPU: unmeasured there"


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.stress)])
def device(request):
    """Where the network is; TF32 is off, so that both give the same numbers."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def cuda():
    """For what has no meaning on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return "cuda"
