#!/usr/bin/env bash
# Fills .dev/ with what a GPU machine without network may lack: the wheels of packages.txt and a newer ptxas.
#
#   bash benchmarks/gpu/pack.sh        then copy the checkout with .dev/, and run there: bash .dev/run.sh 560
#
# Wants Python 3.12 with pip (PYTHON, default python3.12) and a network; the machine is x86-64 Linux with Python 3.12.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
python=${PYTHON:-python3.12}
ptxas=nvidia-cuda-nvcc==13.5.37 # before 13.3 ptxas miscompiles some of Hopper's matrix instructions

# pip takes a platform by its exact name, so each that wheels are published for is named.
download=("$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  download+=(--platform "${platform}_x86_64")
done

mkdir -p .dev/wheels
cat >.dev/run.sh <<'RUN'
#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../benchmarks/gpu.sh" "$@"
RUN

# The wheels of an older packages.txt would be installed too.
if ! cmp -s "$here/packages.txt" .dev/packages.txt; then
  rm -f .dev/wheels/*.whl
  "${download[@]}" --dest .dev/wheels --requirement "$here/packages.txt"
  cp "$here/packages.txt" .dev/packages.txt
fi

if [[ ! -f .dev/ptxas.xz ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  "${download[@]}" --dest "$folder" "$ptxas"
  "$python" - "$folder"/*.whl .dev/ptxas.xz <<'PYTHON'
import lzma
import sys
import zipfile

wheel, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith("bin/ptxas")]
    data = archive.read(name)
with lzma.open(target + ".unfinished", "wb", preset=6) as file:
    file.write(data)
PYTHON
  mv .dev/ptxas.xz.unfinished .dev/ptxas.xz
fi

bytes_of_files=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1)
bytes_of_pack=$(du -sb .dev | cut -f1)
echo "packed into .dev/: $((bytes_of_pack / 1048576)) MiB; with the checkout: $(((bytes_of_files + bytes_of_pack) / 1048576)) MiB"
ls -l .dev .dev/wheels
