set -e
export GIT_AUTHOR_NAME=w GIT_AUTHOR_EMAIL=w@w GIT_COMMITTER_NAME=w GIT_COMMITTER_EMAIL=w@w
git init -q -b main one && cd one
for n in 1 2 3; do echo $n > file$n; git add file$n; git commit -qm "commit $n"; done
git checkout -qb side && echo side > side && git add side && git commit -qm side
git checkout -q main && git merge -q --no-ff -m merge side
git gc -q && cd .. && git clone -q one two && cd two
git log --oneline | wc -l && git fsck && git status --porcelain
