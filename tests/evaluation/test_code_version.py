import diffjax
from diffjax.evaluation.protocol import code_version


def test_it_names_the_package_version_first():
    version = code_version()
    assert version == diffjax.__version__ or version.startswith(f"{diffjax.__version__}+")
