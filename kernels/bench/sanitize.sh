#!/usr/bin/env bash
# Run every operation once, on small shapes, under compute-sanitizer; in about a minute on one GPU.
#
#   kernels/bench/sanitize.sh [memcheck|racecheck|initcheck|synccheck] [PYTHON]
#
# Exit code 1 if a check fails or the sanitizer finds anything, 2 where there is no compute-sanitizer or no GPU.
set -u
tool=${1:-memcheck}
python=${2:-python3}
cd "$(dirname "$0")/../.." || exit 2

find_sanitizer() {
  command -v compute-sanitizer && return
  local file site
  for file in /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer; do
    [ -x "$file" ] && echo "$file" && return
  done
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  find -L "$site/nvidia" -name compute-sanitizer -type f -perm -u+x 2>/dev/null | head -n 1 | grep .
}

if ! sanitizer=$(find_sanitizer); then
  echo "no compute-sanitizer: it is not on the PATH, in /usr/local/cuda*, nor among the nvidia wheels of $python"
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: torch of $python sees none"
  exit 2
fi
# Without torch's cache each tensor is an allocation of its own, so that a step outside it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:kernels
exec "$sanitizer" --tool "$tool" --target-processes application-only --error-exitcode 1 --print-limit 20 "$python" -m bench.once
