set -euo pipefail
total=$(seq 1 100 | awk '{ s += $1 } END { print s }' | tee sum.txt | sed 's/^/sum /')
diff <(sort -r sum.txt) <(cat sum.txt)
sleep 0.05 & sleep 0.05 & wait
declare -A map=([a]=1 [b]=2)
trap 'echo trapped ${#map[@]}' EXIT
find /usr/bin -maxdepth 1 -name 'b*' | xargs -P 4 -n 8 ls -d > /dev/null
tar cf - sum.txt | gzip | tar tzf - | grep -q sum.txt
echo "$total"
