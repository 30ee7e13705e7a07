// What Go programs do: goroutines, timers, garbage, files, sockets, children.
package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	var group sync.WaitGroup
	sums := make(chan int, 64)
	for worker := 0; worker < 64; worker++ {
		group.Add(1)
		go func() {
			defer group.Done()
			total := 0
			for i := 0; i < 20000; i++ {
				total += len(bytes.Repeat([]byte{1}, i%64))
			}
			time.Sleep(time.Millisecond)
			sums <- total
		}()
	}
	group.Wait()
	close(sums)
	total := 0
	for sum := range sums {
		total += sum
	}
	runtime.GC()

	directory, err := os.MkdirTemp("", "go")
	check(err)
	path := filepath.Join(directory, "socket")
	listener, err := net.Listen("unix", path)
	check(err)
	go func() {
		connection, err := listener.Accept()
		check(err)
		connection.Write([]byte("over a socket"))
		connection.Close()
	}()
	connection, err := net.Dial("unix", path)
	check(err)
	var heard bytes.Buffer
	_, err = heard.ReadFrom(connection)
	check(err)

	output, err := exec.Command("/bin/echo", "from a child").Output()
	check(err)
	fmt.Printf("%d %s, %s", total, heard.String(), output)
}
